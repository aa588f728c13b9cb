"""What a new process does for `verify`: `python -m veneer.elsewhere HOW REQUEST`, HOW one of veneer, transformers, peft."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any


def load_base(request: dict[str, Any]) -> Any:
    """The base model, by its class, as it is on disk."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = request["base"]
    if not Path(where).is_dir() and "/" not in where:
        from ..files.embedded import locate_model

        where = locate_model(where)
    cls = getattr(transformers, request["class"], None) or getattr(
        importlib.import_module(request["module"]), request["class"]
    )
    options: dict[str, Any] = {}
    if request["dtype"]:
        options["dtype"] = getattr(torch, request["dtype"])
    if request["attention"]:
        options["attn_implementation"] = request["attention"]
    classes = request["classes"]
    if classes and transformers.AutoConfig.from_pretrained(where).num_labels != classes:
        options |= {"num_labels": classes, "ignore_mismatched_sizes": True}  # the adapter brings the head for them
    return cls.from_pretrained(where, **options).eval()


def main(how: str, path: str) -> None:
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(path).read_text("utf-8"))
    place = Path(request["folder"])
    inputs = load_file(place / "inputs.safetensors")
    answer: dict[str, Any] = {"checks": [], "merged": "", "why": ""}
    base = load_base(request)
    if how == "transformers":
        said = said_by(base, inputs)
        if "veneer.lifecycle.adapters" in sys.modules:
            raise RuntimeError("Veneer's runtime was loaded, so this proves nothing")
    elif how == "peft":
        peft = importlib.import_module("peft")  # what is looked at, in a process that has nothing of ours
        said = said_by(peft.PeftModel.from_pretrained(base, request["adapter"]).eval(), inputs)
    else:
        from ..model.peft_model import PeftModel
        from . import verify

        model = PeftModel.from_pretrained(base, request["adapter"])
        said = verify.model_outputs(model, inputs)
        reference = load_file(place / "said.safetensors")["said"]
        checks = verify.check_merging(model, "default", inputs, reference)
        answer["checks"] = [dataclasses.asdict(c) for c in checks]
        if checks[0].passed is None:
            answer["why"] = checks[0].note
        else:
            merged: Any = model.merge_and_unload()
            merged.save_pretrained(place / "merged")
            answer["merged"] = str(place / "merged")
    save_file({"said": said.contiguous()}, place / f"{how}-said.safetensors")
    (place / f"{how}-answer.json").write_text(json.dumps(answer), "utf-8")


def said_by(model: Any, inputs: dict[str, Any]) -> Any:
    """As `verify.outputs`, without Veneer."""
    import torch
    from torch import Tensor

    with torch.no_grad():
        out = model(**inputs)
    values = out.values() if hasattr(out, "values") else out if isinstance(out, (tuple, list)) else [out]
    found = [v for v in (getattr(out, "logits", None), *values) if isinstance(v, Tensor) and v.is_floating_point()]
    return found[0].float()


if __name__ == "__main__":
    main(*sys.argv[1:])
