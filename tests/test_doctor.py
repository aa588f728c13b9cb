"""The doctor: what it finds in files, and that what it writes loads for real, with the same outputs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from models import MODELS
from small import deviation, scramble
from veneer.checks.doctor_files import DIFFUSERS_NAME
from veneer.checks.doctor_programs import TARGETS
from veneer.cli.app import app
from veneer.peft import method_names


def base(name: str) -> Any:
    """A tiny model whose outputs depend on every layer by more than rounding."""
    model = MODELS[name].make()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1).add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def says(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model.eval()(**MODELS[name].inputs()).logits  # type: ignore[no-any-return]


def saved(folder: Path, name: str = "llama", config: str = "LoraConfig", **options: Any) -> Tensor:
    """Write an adapter that is not at its start; returns the outputs with it."""
    options = {"target_modules": ["q_proj", "v_proj"], **options} if config != "PromptTuningConfig" else options
    model = veneer.get_peft_model(base(name), getattr(veneer, config)(**options))
    scramble(model)
    model.save_pretrained(folder)
    return says(model, name)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def told(*arguments: Any) -> tuple[dict[str, Any], int]:
    done = run(*arguments, "--json")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return json.loads(done.stdout), done.exit_code


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def edit(folder: Path, keys: Callable[[str], str] | None = None, **fields: Any) -> None:
    """Rename keys of an adapter's file, and change fields of its config."""
    if keys is not None:
        found = load_file(folder / "adapter_model.safetensors")
        save_file({keys(k): v for k, v in found.items()}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))


def as_vllm_reads(folder: Path) -> dict[str, Tensor]:
    """The changes of weights that vLLM makes of a folder: r, lora_alpha, use_rslora, and the keys it knows, alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and not config["use_dora"] and config["target_modules"]
    assert config["r"] in TARGETS["vllm"].ranks  # type: ignore[operator]
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    found = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key, A in found.items():
        assert key.startswith("base_model.model.") and key.endswith((".lora_A.weight", ".lora_B.weight")), key
        if key.endswith(".lora_A.weight"):
            changes[key] = scale * found[key.replace("lora_A", "lora_B")] @ A
    return changes


def changes_of(folder: Path, name: str) -> dict[str, Tensor]:
    model = veneer.PeftModel.from_pretrained(base(name), folder)
    found = {}
    for site in model.runtime.places["default"]:
        method, p = site.adapter("default")  # type: ignore[misc]
        with torch.no_grad():
            found[f"base_model.model.{site.name}.lora_A.weight"] = method.delta(p, site).dense().clone()  # type: ignore[union-attr]
    return found


def nothing(key: str) -> str:
    return key


# What is done to a sound adapter: its config, names of its keys, fields; who minds, and what they are told.
CURABLE: list[Any] = [
    ("patterns", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.v_proj": 3}, "use_rslora": True}, nothing, {},
     ["vllm"], "patterns are not read"),
    ("ranks", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 3}, "lora_alpha": 8}, nothing, {}, ["vllm"],
     "patterns are not read"),
    ("adapter in key", {}, lambda k: k.replace(".weight", ".default.weight"), {}, ["vllm", "transformers"], "stay as if untrained"),
    ("no prefix", {}, lambda k: k.removeprefix("base_model.model."), {}, ["peft"], "stay as if untrained"),
    ("DDP", {}, lambda k: f"module.{k}", {}, ["vllm", "transformers", "peft"], "stay as if untrained"),
    ("compiled", {}, lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."), {},
     ["vllm", "transformers", "peft"], "stay as if untrained"),
    ("named copies", {}, nothing, {"modules_to_save": ["classifier", "score"]}, ["vllm"], "though the file has none"),
    ("named biases", {}, nothing, {"bias": "lora_only"}, ["vllm"], "though the file has none"),
    ("no targets", {}, nothing, {"target_modules": None}, ["vllm"], "a required field"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "keys", "fields", "minds", "why"), [c[1:] for c in CURABLE], ids=[c[0] for c in CURABLE]
)
def test_cures(tmp_path: Path, options: Any, keys: Any, fields: Any, minds: Any, why: str) -> None:
    sick, well = tmp_path / "sick", tmp_path / "well"
    y = saved(sick, **options)
    changes = changes_of(sick, "llama")
    edit(sick, keys, **fields)
    before = digest(sick)
    said, status = told(sick)
    errors = [f for f in said["findings"] if f["level"] == "error"]
    assert status == 1 and {f["target"] for f in errors} == set(minds) and all(why in f["why"] for f in errors)
    assert said["loads"] == {t: t not in minds for t in ("vllm", "transformers", "peft")} and said["written"] is None
    said, status = told(sick, "--fix", "--out", well)
    assert status == 0 and all(said["loads"].values()) and said["written"] == str(well)
    assert {f["target"] for f in said["findings"] if f["fixed"] and f["level"] == "error"} == set(minds)
    assert digest(sick) == before
    assert told(well)[1] == 0
    # In the programs themselves.
    for load in (peft.PeftModel.from_pretrained, veneer.PeftModel.from_pretrained):
        assert deviation(says(load(base("llama"), well), "llama"), y) <= 1e-5
    plain = base("llama")
    plain.load_adapter(str(well))
    assert deviation(says(plain, "llama"), y) <= 1e-5
    read = as_vllm_reads(well)
    assert read.keys() == changes.keys() and all(deviation(read[k], changes[k]) <= 1e-5 for k in read)


def test_what_is_minded_is_so(tmp_path: Path) -> None:
    """The facts in the table that the installed programs can show: they load these files, and compute something else."""
    y = saved(tmp_path / "plain")
    edit(tmp_path / "plain", lambda k: k.replace(".weight", ".default.weight"))
    model = base("llama")
    model.load_adapter(str(tmp_path / "plain"))
    assert deviation(says(model, "llama"), y) > 0.001
    y = saved(tmp_path / "bare")
    edit(tmp_path / "bare", lambda k: k.removeprefix("base_model.model."))
    assert deviation(says(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "bare"), "llama"), y) > 0.001
    assert set(method_names.PEFT_METHODS) == {t.value for t in peft.PeftType}
    for config in ("VeraConfig", "PromptTuningConfig"):
        options = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"} if config == "PromptTuningConfig" else {}
        model = veneer.get_peft_model(base("llama"), getattr(veneer, config)(**options))
        model.save_pretrained(tmp_path / config)
        with pytest.raises(ValueError, match="does not support"):
            base("llama").load_adapter(str(tmp_path / config))
        said, status = told(tmp_path / config, "--for", "transformers")
        assert status == 1 and said["findings"][0]["where"] == "peft_type"


def test_rslora(tmp_path: Path) -> None:
    experts = {"target_modules": None, "target_parameters": list(MODELS["mixtral"].experts)}
    y = saved(tmp_path / "a", "mixtral", use_rslora=True, lora_alpha=6, **experts)
    found = told(tmp_path / "a", "--for", "vllm")[0]["findings"]
    assert [f["where"] for f in found if f["level"] == "error"] == ["use_rslora"] and "55545" in found[0]["source"]
    said, status = told(tmp_path / "a", "--for", "vllm,peft", "--fix", "--out", tmp_path / "b")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert status == 0 and config["use_rslora"] is False and config["lora_alpha"] == pytest.approx(6 * 8**0.5)
    for load in (peft.PeftModel.from_pretrained, veneer.PeftModel.from_pretrained):
        assert deviation(says(load(base("mixtral"), tmp_path / "b"), "mixtral"), y) <= 1e-5


def test_magnitudes(tmp_path: Path) -> None:
    y = saved(tmp_path / "dora", use_dora=True)
    plain = base("llama")
    plain.load_adapter(str(tmp_path / "dora"))
    assert deviation(says(plain, "llama"), y) > 0.001  # the magnitudes stayed at their start
    said, status = told(tmp_path / "dora", "--for", "transformers,peft", "--fix", "--out", tmp_path / "well")
    assert status == 0 and [f["target"] for f in said["findings"]] == ["transformers"]
    plain = base("llama")
    plain.load_adapter(str(tmp_path / "well"))
    assert deviation(says(plain, "llama"), y) <= 1e-5
    for load in (peft.PeftModel.from_pretrained, veneer.PeftModel.from_pretrained):
        assert deviation(says(load(base("llama"), tmp_path / "well"), "llama"), y) <= 1e-5
    said, status = told(tmp_path / "dora", "--for", "vllm")
    assert status == 1 and "veneer convert" in said["findings"][0]["remedy"] and not said["findings"][0]["fixable"]


INCURABLE: list[Any] = [
    ("llama", "LoraConfig", {"init_lora_weights": "pissa"}, "vllm", "start 'pissa'", "--rank 16 --out FOLDER, which is exact"),
    ("llama", "LoraConfig", {"modules_to_save": ["lm_head"]}, "vllm", "full copies of modules", "veneer merge"),
    ("llama", "LoraConfig", {"trainable_token_indices": [1, 2]}, "vllm", "trained token rows", "veneer merge"),
    ("bert", "LoraConfig", {"target_modules": ["query"], "bias": "lora_only"}, "vllm", "2 trained biases", "veneer merge"),
    ("bert", "LoraConfig", {"target_modules": ["query"], "lora_bias": True}, "vllm", "biases on B", "veneer merge"),
    ("llama", "LoHaConfig", {}, "vllm", "method LOHA", "veneer convert"),
    ("llama", "LoraConfig", {}, "diffusers", "not of a diffusion model", "load it with transformers or peft"),
    ("bert", "BitFitConfig", None, "peft", "method BITFIT", "veneer merge"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "options", "target", "what", "remedy"), INCURABLE)
def test_what_has_no_exact_cure(
    tmp_path: Path, name: str, config: str, options: Any, target: str, what: str, remedy: str
) -> None:
    if options is None:
        veneer.get_peft_model(base(name), veneer.BitFitConfig()).save_pretrained(tmp_path / "a")
    else:
        saved(tmp_path / "a", name, config, **options)
    said, status = told(tmp_path / "a", "--for", target, "--fix", "--out", tmp_path / "out")
    found = [f for f in said["findings"] if f["level"] == "error" and not f["fixed"]]
    assert status == 1 and found[0]["what"] == what and remedy in found[0]["remedy"]
    assert found[0]["source"] and not found[0]["fixable"]


def test_a_computed_start_keeps_its_rank(tmp_path: Path) -> None:
    """Zeros would not be exact: peft takes out of the base what a start of the config's rank is."""
    saved(tmp_path / "a", init_lora_weights="pissa", r=4)
    said, status = told(tmp_path / "a", "--for", "vllm,peft", "--fix", "--out", tmp_path / "out")
    assert status == 1 and said["written"] is None and not (tmp_path / "out").exists()
    saved(tmp_path / "b", r=4)
    assert told(tmp_path / "b", "--for", "vllm,peft", "--fix", "--out", tmp_path / "out")[0]["written"]


def test_the_remedies_it_names_work(tmp_path: Path) -> None:
    """Convert at the rank it says, then nothing is minded, and the outputs are the same."""
    base("llama").save_pretrained(tmp_path / "base")
    y = saved(tmp_path / "pissa", init_lora_weights="pissa", r=4)
    rank = told(tmp_path / "pissa", "--for", "vllm")[0]["findings"][0]["remedy"].partition("--rank ")[2].split()[0]
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "pissa"), "--rank", rank, "--out", str(tmp_path / "lora"),
                                    "--model", str(tmp_path / "base")])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert told(tmp_path / "lora", "--for", "vllm,transformers,peft")[1] == 0
    as_vllm_reads(tmp_path / "lora")
    assert deviation(says(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "lora"), "llama"), y) <= 0.0001


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 8}
    return UNet2DConditionModel(**blocks, **sizes, attention_head_dim=2, norm_num_groups=4).eval()


def denoised(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    with torch.no_grad():
        return model(noise, torch.tensor([3]), text).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "options",
    [{"lora_alpha": 2}, {"lora_alpha": 3, "use_dora": True}, {"use_rslora": True, "rank_pattern": {"to_q": 2}}],
)
def test_a_unet_for_diffusers(tmp_path: Path, options: Any) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Pipeline

    def loaded(folder: Path) -> Tensor:
        model = unet()
        state, alphas, metadata = Pipeline.lora_state_dict(str(folder), return_lora_metadata=True)
        assert all("lora" in key for key in state)
        Pipeline.load_lora_into_unet(state, alphas, model, adapter_name="x", metadata=metadata)
        return denoised(model)

    model = veneer.get_peft_model(
        unet(), veneer.LoraConfig(**{"r": 4, "target_modules": ["to_q", "to_v", "conv1"], **options})
    )
    scramble(model)
    model.eval().save_pretrained(tmp_path / "sick")
    y = denoised(model)
    assert deviation(loaded(tmp_path / "sick"), y) > 0.01  # nothing is loaded, without an error
    said, status = told(tmp_path / "sick")
    assert status == 1 and said["loads"] == {"diffusers": False, "peft": True}
    said, status = told(tmp_path / "sick", "--fix", "--in-place")
    assert status == 0 and said["written"] == str(tmp_path / "sick")
    assert deviation(loaded(tmp_path / "sick"), y) <= 1e-5
    again = peft.PeftModel.from_pretrained(unet(), tmp_path / "sick").eval()
    assert deviation(denoised(again), y) <= 1e-5
    assert told(tmp_path / "sick")[1] == 0
    assert told(tmp_path / "sick", "--for", "vllm")[0]["findings"][0]["what"]
    # A stale file beside newer weights is minded too.
    found = load_file(tmp_path / "sick/adapter_model.safetensors")
    save_file({k: v * 2 for k, v in found.items()}, tmp_path / "sick/adapter_model.safetensors")
    assert "other weights" in told(tmp_path / "sick", "--for", "diffusers")[0]["findings"][0]["what"]


def test_a_flux_transformer_for_diffusers(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    def transformer() -> Any:
        torch.manual_seed(0)
        sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
        widths = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]}
        return FluxTransformer2DModel(**sizes, **widths, num_attention_heads=2).eval()

    def seen(model: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        tokens, text, pooled = (torch.randn(s, generator=generator) for s in ((1, 4, 4), (1, 3, 32), (1, 32)))
        places = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3), "timestep": torch.tensor([0.5])}
        with torch.no_grad():
            return model(tokens, text, pooled, **places).sample  # type: ignore[no-any-return]

    options = {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["to_q", "to_out.0", "proj_mlp"],
        "alpha_pattern": {"proj_mlp": 6},
    }
    model = veneer.get_peft_model(transformer(), veneer.LoraConfig(**options))
    scramble(model)
    y = seen(model.eval())
    model.save_pretrained(tmp_path / "sick")
    assert told(tmp_path / "sick", "--fix", "--out", tmp_path / "well")[1] == 0
    other = transformer()
    other.load_lora_adapter(load_file(tmp_path / "well" / DIFFUSERS_NAME), prefix="transformer", adapter_name="x")
    assert deviation(seen(other), y) <= 1e-5 and deviation(seen(transformer()), y) > 0.01


def test_a_text_encoder_for_diffusers(tmp_path: Path) -> None:
    from diffusers.loaders.lora_base import _load_lora_into_text_encoder
    from transformers import CLIPTextConfig, CLIPTextModel

    def encoder() -> Any:
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        return CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=16)).eval()

    ids = torch.arange(3, 11)[None]
    model = veneer.get_peft_model(
        encoder(), veneer.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "out_proj"])
    )
    scramble(model)
    model.eval().save_pretrained(tmp_path / "sick")
    assert told(tmp_path / "sick", "--fix", "--out", tmp_path / "well")[1] == 0
    found = load_file(tmp_path / "well" / DIFFUSERS_NAME)
    other = encoder()
    _load_lora_into_text_encoder(found, None, other, prefix="text_encoder", adapter_name="x")
    with torch.no_grad():
        y = model(input_ids=ids).last_hidden_state
        assert deviation(other(input_ids=ids).last_hidden_state, y) <= 1e-5
        assert deviation(encoder()(input_ids=ids).last_hidden_state, y) > 0.001


def test_pickles_and_other_files(tmp_path: Path) -> None:
    y = saved(tmp_path / "a", r=8)
    torch.save(load_file(tmp_path / "a/adapter_model.safetensors"), tmp_path / "a/adapter_model.bin")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    said, status = told(tmp_path / "a")
    assert status == 0 and {f["what"] for f in said["findings"]} == {"pickled weights"}
    assert told(tmp_path / "a", "--fix")[0]["written"] == str(tmp_path / "a-fixed")
    assert {f.name for f in (tmp_path / "a-fixed").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert deviation(says(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "a-fixed"), "llama"), y) <= 1e-5
    assert told(tmp_path / "a", "--fix", "--in-place")[1] == 0 and not (tmp_path / "a/adapter_model.bin").exists()


def test_dtypes(tmp_path: Path) -> None:
    y = saved(tmp_path / "a", r=8)
    said, status = told(tmp_path / "a", "--dtype", "bfloat16", "--fix", "--out", tmp_path / "half")
    assert status == 0 and all(f["fixed"] for f in said["findings"])
    found = load_file(tmp_path / "half/adapter_model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert deviation(says(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "half"), "llama"), y) <= 0.03
    first = next(iter(found))
    save_file({**found, first: found[first].fill_(1e6)}, tmp_path / "half/adapter_model.safetensors")
    warned = [f for f in told(tmp_path / "half", "--for", "vllm")[0]["findings"] if f["level"] == "warning"]
    assert warned[0]["where"] == first and "float16 ends there" in warned[0]["why"]
    done = run(tmp_path / "half", "--dtype", "float16", "--fix", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "beyond float16's largest" in done.output and not (tmp_path / "out").exists()
    save_file({**found, first: found[first].fill_(math.nan)}, tmp_path / "half/adapter_model.safetensors")
    assert "not finite" in told(tmp_path / "half")[0]["findings"][0]["what"]


def test_damage(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    edit(tmp_path / "a", r=5)
    assert "rank 8 where the config says 5" in told(tmp_path / "a")[0]["findings"][0]["what"]
    edit(tmp_path / "a", r=8)
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    found.pop(next(k for k in found if "lora_A" in k))
    save_file(found, tmp_path / "a/adapter_model.safetensors")
    assert "without its partner" in told(tmp_path / "a")[0]["findings"][0]["what"]
    save_file({**found, "base_model.model.lm_head.weight": torch.ones(2, 2)}, tmp_path / "a/adapter_model.safetensors")
    assert any("no LoRA" in f["what"] for f in told(tmp_path / "a", "--for", "vllm")[0]["findings"])


def test_two_keys_of_one_name_lose_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    save_file({**found, **{f"module.{k}": v + 1 for k, v in found.items()}}, tmp_path / "a/adapter_model.safetensors")
    before = digest(tmp_path / "a")
    done = run(tmp_path / "a", "--fix", "--in-place")
    assert done.exit_code == 2 and "two keys of the file" in done.output and digest(tmp_path / "a") == before


BAD: list[Any] = [
    (("nowhere",), "there is no such folder"),
    (("empty",), "holds no adapter_config.json"),
    (("strange",), "is no adapter in peft's layout"),
    (("cut",), "is damaged"),
    (("good", "--for", "vlm"), "did you mean 'vllm'"),
    (("good", "--out", "x"), "give --fix too"),
    (("good", "--fix", "--out", "good"), "is not empty"),
    (("good", "--fix", "--in-place", "--out", "x"), "give one of them"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_clear_line(tmp_path: Path, monkeypatch: Any, arguments: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "strange"):
        (tmp_path / name).mkdir()
    (tmp_path / "strange/adapter_config.json").write_text('{"model_type": "llama"}')
    for name in ("good", "cut"):
        saved(tmp_path / name)
    weights = tmp_path / "cut/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run(*arguments)
    assert done.exit_code == 2 and message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output and len([line for line in done.output.splitlines() if line]) == 1


def test_the_table_says_what_where_why_and_the_cure(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    saved(tmp_path / "a", alpha_pattern={"q_proj": 2}, r=8)
    done = run(tmp_path / "a")
    assert done.exit_code == 1
    row = next(line for line in done.output.splitlines() if "2 different scales" in line)
    assert "vllm" in row and "alpha_pattern" in row and "patterns are not read" in row
    assert "transformers: will load" in done.output and "vllm: will not load" in done.output
    done = run(tmp_path / "a", "--fix")
    assert done.exit_code == 0 and "fixed" in done.output and "vllm: will load" in done.output
    done = run(tmp_path / "a-fixed", "--fix")
    assert done.exit_code == 0 and "nothing was written" in done.output


def test_every_fact_has_a_source() -> None:
    for name, accepts in TARGETS.items():
        assert accepts.methods and accepts.sources[""], name
