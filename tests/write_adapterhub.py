"""Write adapters made by Veneer in AdapterHub's layout, for their library to read:

python tests/write_adapterhub.py FOLDER
OTHER_ENVIRONMENT/bin/python tests/make_adapterhub_golden.py check FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import veneer
from adapterhub_models import MODELS, fill, logits, old_vit_name
from veneer.files import adapterhub

CONFIGS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"reduction_factor": 4},
    "houlsby": {"kind": "houlsby", "width": 3, "layer_norm": "before"},
    "parallel": {"kind": "parallel", "scaling": "learned", "gating": True},
    "compacter": {"kind": "compacter", "width": 4},
}


def base(name: str) -> Any:
    model = MODELS[name].make()
    fill(model, rename=old_vit_name if name == "vit" else lambda n: n)
    return model


def scramble(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def main(folder: Path) -> None:
    outputs = {}
    for name in MODELS:
        for label, options in CONFIGS.items():
            if (name, label) == ("t5", "compacter"):
                continue  # their library does not load T5's shared rule either
            model = veneer.get_peft_model(base(name), veneer.BottleneckConfig(**options)).eval()
            scramble(model)
            target = folder / f"{name}_{label}"
            adapterhub.save(model, target)
            (target / "model.json").write_text(json.dumps({"model": name}))
            outputs[target.name] = logits(model, name)
    for name in ("bert", "llama"):
        model = veneer.get_peft_model(base(name), veneer.BottleneckConfig(reduction_factor=4), "part0").eval()
        model.add_adapter("part1", veneer.BottleneckConfig(reduction_factor=2))
        model.add_adapter("fused", veneer.AdapterFusionConfig(adapter_names=["part0", "part1"]))
        model.set_adapter("fused")
        scramble(model)
        target = folder / f"{name}_fused"
        for part in ("part0", "part1"):
            adapterhub.save(model, target / part, part)
        adapterhub.save(model, target / "fusion", "fused")
        (target / "model.json").write_text(json.dumps({"model": name}))
        outputs[target.name] = logits(model.eval(), name)
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
