"""What is measured. Each function checks what it is about to time, then returns its figures."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, MT5Config

import veneer
from veneer import codec

from .harness import Figure, Red, figure, interleaved, ratio

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {"num_key_value_heads": 8, "vocab_size": 32000}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
BENCHES: dict[str, Callable[[bool], list[Figure]]] = {}


def bench(function: Callable[[bool], list[Figure]]) -> Callable[[bool], list[Figure]]:
    BENCHES[function.__name__] = function
    return function


def meta(sizes: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes))


def scramble(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@bench
def announcement(quick: bool) -> list[Figure]:
    """The line peft's announcement prints, on mt0-large's shapes."""
    sizes = {"vocab_size": 250112, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(MT5Config(**sizes, feed_forward_proj="gated-gelu"))
        model.lm_head.weight = nn.Parameter(torch.empty(250112, 1024))
    config = veneer.LoraConfig(
        task_type=veneer.TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    counts = veneer.get_peft_model(model, config).get_nb_trainable_parameters()
    off = float(counts != (2_359_296, 1_231_940_608))
    return [Figure("mt0-large prints 2,359,296 of 1,231,940,608", off, off, off, "bool", bar=0.0, note=str(counts))]


@bench
def parity(quick: bool) -> list[Figure]:
    """Largest differences from peft, from the same file, over architectures and methods."""
    from parity import test_parity  # noqa: F401
    from parity.test_parity import CASES, loaded_by, made_by, outputs, peft_named

    worst: dict[str, tuple[float, str]] = {"outputs": (0.0, ""), "gradients": (0.0, ""), "loss curves": (0.0, "")}
    cells = [(c, n) for c in ("lora_all", "dora", "loha", "ia3", "oft", "vera", "lora_experts") for n in CASES[c][2]]
    for case, name in cells[:4] if quick else cells:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made_by(peft, case, name, Path(folder))
            theirs, ours = (loaded_by(library, name, Path(folder)) for library in (peft, veneer))
            (a, loss), (b, other) = outputs(ours, name), outputs(theirs, name)
            note(worst, "outputs", (a - b).abs().max().item(), f"{case} on {name}")
            loss.backward()
            other.backward()
            mine = dict(codec.named_tensors(ours))
            for key, p in peft_named(theirs):
                if p.grad is not None and key in mine:
                    note(worst, "gradients", (mine[key].grad - p.grad).abs().max().item(), f"{case} on {name}")
            if name in ("llama", "gpt2", "bert", "t5"):
                curves = []
                for library in (peft, veneer):
                    model = loaded_by(library, name, Path(folder)).train()
                    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
                    curve = []
                    for _ in range(20):
                        optimizer.zero_grad()
                        step_loss = outputs(model, name)[1]
                        step_loss.backward()
                        optimizer.step()
                        curve.append(step_loss.item())
                    curves.append(torch.tensor(curve))
                note(worst, "loss curves", (curves[0] - curves[1]).abs().max().item(), f"{case} on {name}")
    bars = {"outputs": 1e-5, "gradients": 1e-5, "loss curves": 1e-4}
    made = [
        Figure(f"{k} against peft", v, v, v, "difference", bar=bars[k], note=f"worst: {w}")
        for k, (v, w) in worst.items()
    ]
    if any(f.within is False for f in made):
        raise Red("parity with peft", [f"{f.name}: {f.value:.2e} ({f.note})" for f in made])
    return made


def note(worst: dict[str, tuple[float, str]], key: str, value: float, where: str) -> None:
    if value > worst[key][0]:
        worst[key] = (value, where)


@bench
def merging(quick: bool) -> list[Figure]:
    """Forward against merge over the table of methods and layers; bits after 100 cycles in bfloat16."""
    from small import bits, llama, lora
    from table import LAYERS
    from test_table import CELLS, adapted, relative

    worst, where = 0.0, ""
    for method, layer in CELLS[:: 7 if quick else 1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = LAYERS[layer].input()
            model = adapted(method, layer)
            before = model(x)
            model.merge_adapter()
            gap = relative(model(x), before)
        if gap > worst:
            worst, where = gap, f"worst of {len(CELLS)} cells: {method} on {layer}"
    model = lora(llama(2, torch.bfloat16))
    start = bits(model)
    changed = 0.0
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
        changed += bits(model) != start
    return [
        Figure("forward = merge, relative", worst, worst, worst, "difference", bar=2e-5, note=where),
        Figure("bits restored by 100 bf16 cycles", changed, changed, changed, "bool", bar=0.0),
    ]


@bench
def importing(quick: bool) -> list[Figure]:
    """Seconds that `import veneer` takes beyond `import torch`, in new processes."""
    uses = "import veneer; veneer.get_peft_model; veneer.LoraConfig; veneer.PeftModel"
    code = "import time; import torch; s = time.perf_counter(); {}; print(time.perf_counter() - s)"
    values: dict[str, list[float]] = {"veneer": [], "peft": []}
    for i in range(4 if quick else 12):
        for name, text in (("veneer", uses), ("peft", uses.replace("veneer", "peft"))):
            done = subprocess.run([sys.executable, "-c", code.format(text)], capture_output=True, text=True, check=True)
            if i:
                values[name].append(float(done.stdout))
    reference = figure("", values["peft"], "s").value
    return [figure("import veneer beyond torch", values["veneer"], "s", bar=0.15, reference=reference)]


@bench
def injecting(quick: bool) -> list[Figure]:
    """All-linear LoRA on the Llama-70B shape on the meta device: the first adapter, the second, the 41st."""
    names = ("first", "second", "41st")
    taken: dict[str, dict[str, list[float]]] = {lib: {n: [] for n in names} for lib in ("veneer", "peft")}
    for _ in range(2 if quick else 5):
        for name, library in (("veneer", veneer), ("peft", peft)):
            model = meta(LLAMA_70B)
            config = library.LoraConfig(r=16, target_modules="all-linear")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                start = time.perf_counter()
                adapted = library.get_peft_model(model, config, low_cpu_mem_usage=True)
                taken[name]["first"].append(time.perf_counter() - start)
                for i in range(2, 42 if library is veneer and not quick else 3):
                    more = library.LoraConfig(r=16, target_modules="all-linear")
                    start = time.perf_counter()
                    adapted.add_adapter(f"a{i}", more, low_cpu_mem_usage=True)
                    seconds = time.perf_counter() - start
                    if i == 2:
                        taken[name]["second"].append(seconds)
                    if i == 41:
                        taken[name]["41st"].append(seconds)
            if library is veneer and len(adapted.runtime.sites) != 560:
                raise Red("injection", [f"{len(adapted.runtime.sites)} sites instead of 560"])
    made = []
    for n in names:
        if taken["veneer"][n]:
            theirs = figure("", taken["peft"][n], "s").value if taken["peft"][n] else None
            made.append(figure(f"inject at 560 sites, {n} adapter", taken["veneer"][n], "s", bar=0.2, reference=theirs))
    if taken["veneer"]["41st"]:
        made.append(ratio("inject, 41st / second", taken["veneer"]["41st"], taken["veneer"]["second"]))
    return made


@bench
def loading(quick: bool) -> list[Figure]:
    """Loading an adapter of 56 linears against reading its file; the 41st against the 1st."""
    made = []
    for hidden in (576, 2048):
        sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": 8}
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 128}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LlamaConfig(**sizes)
            model = AutoModelForCausalLM.from_config(config)
            ours = veneer.get_peft_model(model, veneer.LoraConfig(r=16, target_modules="all-linear"))
            scramble(ours)
            ours.save_pretrained(folder)
            again = veneer.PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), folder)
            own, other = (dict(codec.named_tensors(m)) for m in (ours, again))
            if len(own) != 112 or any(not torch.equal(own[k], other[k]) for k in own):
                raise Red("loading", ["the loaded tensors are not the saved ones"])
            path = Path(folder) / "adapter_model.safetensors"
            count = iter(range(10_000))
            theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), folder)

            runs = {
                "read": partial(load_file, path),
                "veneer": partial(load_next, again, folder, count),
                "peft": partial(load_next, theirs, folder, count),
            }
            taken = interleaved(runs, 5 if quick else 15, warmup=2)
            reference = ratio("", taken["peft"], taken["read"]).value
            size = f"hidden {hidden}, {path.stat().st_size / 1e6:.0f} MB"
            made.append(ratio(f"load 56 linears / read file, {hidden}", taken["veneer"], taken["read"], bar=5.0,
                              reference=reference, note=size))  # fmt: skip
            firsts, lasts = [], []
            for _ in range(3 if quick else 9):
                fresh = veneer.get_peft_model(model.__class__(config), veneer.LoraConfig(target_modules="all-linear"))
                seconds = []
                for i in range(42):
                    start = time.perf_counter()
                    fresh.load_adapter(folder, f"n{i}")
                    seconds.append(time.perf_counter() - start)
                firsts.append(sorted(seconds[:3])[1])
                lasts.append(sorted(seconds[39:42])[1])
            made.append(ratio(f"load the 41st / the 1st, {hidden}", lasts, firsts, bar=1.1))
    return made


def load_next(model: Any, folder: str, count: Iterator[int]) -> Any:
    """Load the adapter under a name that is not taken."""
    return model.load_adapter(folder, f"n{next(count)}")


@bench
def switching(quick: bool) -> list[Figure]:
    """set_adapter with 560 sites."""
    taken: dict[str, list[float]] = {}
    for name, library in (("veneer", veneer), ("peft", peft)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(
                meta(LLAMA_70B), library.LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True
            )
            model.add_adapter("b", library.LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True)
            if (
                library is peft
            ):  # meta parameters cannot be told what they need a gradient for, and it is timed the same
                names = ["default", "b"] * 5
            else:
                names = ["default", "b"] * 500
            values = []
            for adapter in names:
                start = time.perf_counter()
                model.set_adapter(adapter)
                values.append((time.perf_counter() - start) * 1e6)
            taken[name] = values
    return [
        figure("switch at 560 sites", taken["veneer"], "us", bar=20.0, reference=figure("", taken["peft"], "us").value)
    ]


@bench
def training_step(quick: bool) -> list[Figure]:
    """A step of all-linear LoRA on SmolLM2's shape in float32, against the frozen floor and peft."""
    sizes = {**SMOLLM2, "num_hidden_layers": 4, "vocab_size": 4096}
    config = LlamaConfig(**sizes)
    ids = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models: dict[str, Any] = {}
        for name in ("floor", "veneer", "peft"):
            torch.manual_seed(0)
            base = AutoModelForCausalLM.from_config(config)
            if name == "floor":
                base.requires_grad_(False)
                base.enable_input_require_grads()
            elif name == "veneer":
                base = veneer.get_peft_model(base, veneer.LoraConfig(r=8, target_modules="all-linear"))
                scramble(base)
                base.save_pretrained(folder)
            else:
                base = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
            models[name] = base.train()
        gap = (models["veneer"](ids).logits - models["peft"](ids).logits).abs().max().item()
        if gap > 1e-4:
            raise Red("training step", [f"outputs differ by {gap:.1e}"])

        def step(model: Any) -> Callable[[], None]:
            def run() -> None:
                model(input_ids=ids, labels=ids).loss.backward()
                model.zero_grad(set_to_none=True)

            return run

        taken = interleaved({n: step(m) for n, m in models.items()}, 5 if quick else 20, warmup=3)
    theirs = ratio("", taken["peft"], taken["floor"]).value
    return [ratio("LoRA training step / frozen floor", taken["veneer"], taken["floor"], reference=theirs)]
