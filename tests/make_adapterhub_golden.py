"""Write tests/golden_adapterhub: small folders by the `adapters` library, with the outputs they give.

Run with an environment that has adapters 1.3.0 and its transformers:  python tests/make_adapterhub_golden.py
Base weights are not stored: `fill` makes them from their names, here and in the tests. With `check FOLDER` it loads
what tests/write_adapterhub.py wrote with Veneer and compares the outputs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from adapterhub_models import FUSED, MODELS, fill, logits

HERE = Path(__file__).parent / "golden_adapterhub"


def make(name: str) -> Any:
    import adapters

    model = MODELS[name].make()
    fill(model)
    adapters.init(model)
    return model.eval()


def config_of(spec: Any) -> Any:
    import adapters

    kind, options = spec
    known = adapters.ADAPTER_CONFIG_MAP | {"adapter_plus": adapters.AdapterPlusConfig()}
    return known[kind].replace(**options)


def in_bin(label: str, spec: Any) -> bool:
    """adapters cannot write a norm before the bottleneck as safetensors: it has it under two names."""
    return label == "seq_bn_bin" or bool(spec[1].get("ln_before"))


def fill_adapters(model: Any, scale: float = 0.3) -> None:
    fill(model, only=("adapters.", "adapter_fusion_layer.", "shared_parameters."), scale=scale)


def write() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    outputs = {}
    for name, row in MODELS.items():
        for label, spec in row.configs.items():
            model = make(name)
            model.add_adapter("gold", config=config_of(spec))
            fill_adapters(model, 2.0 if "compacter" in label else 0.3)  # their products are small
            model.set_active_adapters("gold")
            folder = HERE / f"{name}_{label}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            model.save_adapter(str(folder), "gold", with_head=False, use_safetensors=not in_bin(label, spec))
            outputs[folder.name] = logits(model, name)
            print(folder.name, float(outputs[folder.name].abs().mean()))
    for label, (name, kinds, fusion) in FUSED.items():
        model = make(name)
        for i, spec in enumerate(kinds):
            model.add_adapter(f"part{i}", config=config_of(spec))
        names = [f"part{i}" for i in range(len(kinds))]
        model.add_adapter_fusion(names, fusion)
        fill_adapters(model)
        from adapters.composition import Fuse

        model.set_active_adapters(Fuse(*names))
        (HERE / label).mkdir()
        for part in names:
            model.save_adapter(str(HERE / label / part), part, with_head=False, use_safetensors=True)
        model.save_adapter_fusion(str(HERE / label / "fusion"), ",".join(names), use_safetensors=True)
        outputs[label] = logits(model, name)
        print(label, float(outputs[label].abs().mean()))
    save_file(outputs, HERE / "outputs.safetensors")


def check(folder: Path) -> None:
    wanted = load_file(folder / "outputs.safetensors")
    worst = 0.0
    for key, expected in wanted.items():
        name = json.loads((folder / key / "model.json").read_text())["model"]
        model = make(name)
        if (folder / key / "fusion").is_dir():
            from adapters.composition import Fuse

            names = sorted(p.name for p in (folder / key).iterdir() if p.name.startswith("part"))
            for part in names:
                model.load_adapter(str(folder / key / part), load_as=part, use_safetensors=True)
            model.load_adapter_fusion(str(folder / key / "fusion"), use_safetensors=True)
            model.set_active_adapters(Fuse(*names))
        else:
            model.load_adapter(str(folder / key), load_as="mine", use_safetensors=True)
            model.set_active_adapters("mine")
        apart = float((logits(model.eval(), name) - expected).abs().max())
        worst = max(worst, apart)
        print(f"{key:32s} {apart:.1e}")
        assert apart <= 1e-5, key
    print("worst", worst)


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(Path(sys.argv[2]))
    else:
        write()
