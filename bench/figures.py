"""What is measured. Each function checks what it is about to time, then returns its figures."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, MT5Config

import veneer
from veneer.files import adapter_files

from .harness import ROOT, Figure, Red, Worst, figure, interleaved, ratio, require

sys.path.insert(0, str(ROOT / "tests"))

Bench = Callable[[bool], list[Figure]]
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {"num_key_value_heads": 8, "vocab_size": 32000}
THIN_70B = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 80, "num_attention_heads": 4}
THIN_70B |= {"num_key_value_heads": 2, "vocab_size": 64}  # as many sites as Llama-70B, real and small
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
LIBRARIES = {"veneer": veneer, "peft": peft}
LINE = "trainable params: 2,359,296 || all params: 1,231,940,608 || trainable%: 0.1915"
HEAVY = ("transformers", "accelerate", "datasets", "bitsandbytes", "peft", "rich", "matplotlib")
BENCHES: dict[str, Bench] = {}
CHECKS: list[str] = []


def bench(function: Bench) -> Bench:
    """Register a measurement."""

    @functools.wraps(function)
    def quiet(quick: bool) -> list[Figure]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(quick)

    BENCHES[function.__name__] = quiet
    return quiet


def check(function: Bench) -> Bench:
    """Register a check of results rather than speed; one above its bar is red."""
    CHECKS.append(function.__name__)

    @functools.wraps(function)
    def required(quick: bool) -> list[Figure]:
        with threads(1):
            return require(function(quick))

    return bench(required)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on `count` threads; small matrices gain nothing from more than one, and wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def meta(sizes: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes))


def real(sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()


def twin(model: Any) -> Any:
    """A model that is another in all but the weights in memory, which it shares.

    Where weights lie alone makes two equal models differ by some percent.
    """
    own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, own)


def scramble(model: nn.Module, seed: int = 1) -> None:
    """Move the trained parameters off their start, where an adapter has no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).detach().abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    return gap(a, b) / b.detach().abs().max().item()


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return statistics.median(values)


@check
def announcement(quick: bool) -> list[Figure]:
    """The line that peft's announcement prints, on mt0-large's shapes."""
    sizes = {"vocab_size": 250112, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(MT5Config(**sizes, feed_forward_proj="gated-gelu"))
        model.lm_head.weight = nn.Parameter(torch.empty(250112, 1024))
    config = veneer.LoraConfig(
        task_type=veneer.TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        veneer.get_peft_model(model, config).print_trainable_parameters()
    off = float(printed.getvalue().strip() != LINE)
    note = printed.getvalue().strip()
    return [Figure("mt0-large prints the announcement's line", off, off, off, "bool", bar=0.0, note=note)]


@check
def parity(quick: bool) -> list[Figure]:
    """Largest differences from peft, from the same file, over architectures and methods."""
    from parity.test_parity import CASES, loaded_by, made_by, outputs, peft_named

    results, gradients, curves = Worst(), Worst(), Worst()
    cells = [(c, n) for c in ("lora_all", "dora", "loha", "ia3", "oft", "vera", "lora_experts") for n in CASES[c][2]]
    for case, name in cells[:: 8 if quick else 1]:
        where = f"{case} on {name}"
        with tempfile.TemporaryDirectory() as folder:
            made_by(peft, case, name, Path(folder))
            theirs, ours = (loaded_by(library, name, Path(folder)) for library in (peft, veneer))
            (a, loss), (b, other) = outputs(ours, name), outputs(theirs, name)
            results.add(gap(a, b) / max(1.0, b.detach().abs().max().item()), where)  # T5's logits are large
            loss.backward()
            other.backward()
            mine = {k: p.grad for k, p in adapter_files.named_tensors(ours) if p.grad is not None}
            wanted = {k: p.grad for k, p in peft_named(theirs) if p.grad is not None}
            if mine.keys() != wanted.keys():
                raise Red("gradients", [f"{where}: {k}" for k in sorted(mine.keys() ^ wanted.keys())[:8]])
            for key, gradient in wanted.items():
                gradients.add(gap(mine[key], gradient), where)
            if name in ("llama", "gpt2", "bert", "t5"):
                steps = [train(loaded_by(library, name, Path(folder)), name, outputs) for library in (veneer, peft)]
                curves.add(gap(*steps), where)
    return [
        results.figure("outputs against peft", 1e-5),
        gradients.figure("gradients against peft", 1e-5),
        curves.figure("loss over 20 steps against peft", 1e-4),
    ]


def train(model: Any, name: str, outputs: Callable[[Any, str], tuple[Tensor, Tensor]]) -> Tensor:
    """Losses of 20 steps."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = outputs(model, name)[1]
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@check
def merging(quick: bool) -> list[Figure]:
    """Forward against merge over the table of methods and layers; bits after 100 cycles in bfloat16."""
    from small import bits, llama, lora
    from table import LAYERS
    from test_table import MERGING, METHODS, adapted, base_for, config_for, randomise
    from test_table import bits as bits_of

    worst = Worst()
    for method, layer in MERGING[:: 7 if quick else 1]:
        x = LAYERS[layer].input()
        model = adapted(method, layer)
        before = model(x)
        model.merge_adapter()
        worst.add(relative(model(x), before), f"{method} on {layer}")
    models = {"lora on llama": (lora(llama(2, torch.bfloat16)), bits)}
    linear = LAYERS["linear"]
    for method in sorted({m for m, n in MERGING if n == "linear"} - {"modules_to_save"}):  # a copy is never merged
        made = veneer.get_peft_model(base_for(linear).to(torch.bfloat16), config_for(METHODS[method], linear, method))
        randomise(made)
        models[f"{method} on linear"] = (made.eval(), bits_of)
    changed: list[str] = []
    for where, (model, bits_in) in models.items():
        start, merged = bits_in(model), None
        for _ in range(10 if quick else 100):
            model.merge_adapter()
            baked = bits_in(model)
            if baked == start:
                raise Red("merge cycles", [f"{where}: merging changes nothing, so there is nothing to restore"])
            model.unmerge_adapter()
            if bits_in(model) != start or baked != (merged or baked):
                changed.append(where)
                break
            merged = baked
    if changed:
        raise Red("merge cycles", [f"{where}: the bits differ" for where in changed])
    note = f"{len(models)} models, each cycle's merged weights the same too"
    return [
        worst.figure("forward = merge, relative", 2e-5),
        Figure("bits restored by 100 bf16 cycles", 0.0, 0.0, 0.0, "bool", bar=0.0, note=note),
    ]


@bench
def importing(quick: bool) -> list[Figure]:
    """Seconds that `import veneer` takes beyond `import torch`, in new processes with compiled modules cached."""
    uses = "import veneer; veneer.get_peft_model; veneer.LoraConfig; veneer.PeftModel"
    code = (
        "import json, sys, time; import torch; s = time.perf_counter(); {}; t = time.perf_counter() - s; "
        f"print(json.dumps([t, [m for m in {HEAVY} if m in sys.modules]]))"
    )
    # Without its cache Python compiles the package anew each time, which nobody who installed it sees.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    values: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    for i in range(4 if quick else 9):
        for name in LIBRARIES:
            command = [sys.executable, "-c", code.format(uses.replace("veneer", name))]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            taken, heavy = json.loads(done.stdout)
            if name == "veneer" and heavy:
                raise Red("importing", [f"import veneer imports {', '.join(heavy)}"])
            if i:
                values[name].append(taken)
    return [figure("import veneer beyond torch", values["veneer"], "s", bar=0.15, reference=median(values["peft"]))]


@bench
def injecting(quick: bool) -> list[Figure]:
    """All-linear LoRA on the Llama-70B shape on the meta device: the first adapter, the second, the 41st."""
    times: dict[str, list[list[float]]] = {name: [] for name in LIBRARIES}
    for i in range(2 if quick else 5):
        found: dict[str, tuple[int, int]] = {}
        for name, library in LIBRARIES.items():
            # peft takes minutes for 41, so it does them once
            count = 3 if quick or (library is peft and i) else 41
            gc.collect()
            taken, found[name] = inject(library, count)
            times[name].append(taken)
        if found["veneer"] != found["peft"] or found["veneer"][0] != 560:
            raise Red("injection", [f"(adapted modules, trained parameters): {found}"])
    ours, theirs = times["veneer"], times["peft"]
    made = [
        figure(f"inject at 560 sites, {what} adapter", [t[at] for t in ours], "s", bar=0.2,
               reference=median([t[at] for t in theirs if len(t) > at]))
        for what, at in (("first", 0), ("second", 1), ("41st", 40)) if len(ours[0]) > at
    ]  # fmt: skip
    if len(ours[0]) > 40:
        growth = {n: [median(t[38:41]) / median(t[1:4]) for t in times[n] if len(t) > 40] for n in LIBRARIES}
        note = "medians of the 39th to 41st and of the 2nd to 4th; the bar for no growth is the one for loading"
        more = {"bar": 1.1, "reference": median(growth["peft"]), "note": note}
        made.append(figure("inject, 41st / second", growth["veneer"], "ratio", **more))
    return made


def inject(library: Any, count: int) -> tuple[list[float], tuple[int, int]]:
    """Seconds of each of `count` adapters; how many modules the first adapts and parameters it trains."""
    model, adapted, taken = meta(LLAMA_70B), None, []
    for i in range(count):
        config = library.LoraConfig(r=16, target_modules="all-linear")
        start = time.perf_counter()
        if adapted is None:
            adapted = library.get_peft_model(model, config, low_cpu_mem_usage=True)
        else:
            adapted.add_adapter(f"a{i}", config, low_cpu_mem_usage=True)
        taken.append(time.perf_counter() - start)
        if not i:
            places = library.get_layer_status(adapted)
            trained = adapted.get_nb_trainable_parameters()[0]
    return taken, (len(places), trained)


@bench
def loading(quick: bool) -> list[Figure]:
    """Loading an adapter of 56 linears against reading its file; the 41st against the 1st."""
    made = []
    for hidden in (576, 2048):
        sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": 8}
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 128}
        with tempfile.TemporaryDirectory() as folder:
            made += load_figures(sizes, hidden, folder, quick)
        gc.collect()
    return made


def load_figures(sizes: dict[str, Any], hidden: int, folder: str, quick: bool) -> list[Figure]:
    path = Path(folder) / "adapter_model.safetensors"
    models = {}
    for name, library in LIBRARIES.items():
        # Base weights that are never read are never paged in, so that the two models fit any machine.
        base = meta(sizes).to_empty(device="cpu")
        models[name] = library.get_peft_model(base, library.LoraConfig(r=16, target_modules="all-linear"))
    scramble(models["veneer"])
    models["veneer"].save_pretrained(folder)
    saved = load_file(path)
    for name, model in models.items():
        model.load_adapter(folder, "x")
        held = dict(tensors(name, model))
        if len(saved) != 112 or held.keys() != saved.keys() or any(not torch.equal(held[k], saved[k]) for k in saved):
            raise Red("loading", [f"{name}: the loaded tensors are not the saved ones"])
        model.delete_adapter("x")
    del held

    def load_one(name: str, touched: bool) -> None:
        models[name].load_adapter(folder, "x")
        if touched:
            touch(t for _, t in tensors(name, models[name]))

    def read_touched() -> None:
        touch(load_file(path).values())

    runs: dict[str, Callable[[], Any]] = {"read": partial(load_file, path), "read touched": read_touched}
    after = {}
    for name, model in models.items():
        for key, touched in ((name, False), (f"{name} touched", True)):
            runs[key] = partial(load_one, name, touched)
            after[key] = partial(model.delete_adapter, "x")
    taken = interleaved(runs, 5 if quick else 15, warmup=2, after=after)
    size = f"{path.stat().st_size / 1e6:.0f} MB"
    made = [
        ratio(f"load 56 linears / load_file, {hidden}", taken["veneer"], taken["read"], bar=3.0,
              row=f"load an adapter of 56 linears ÷ bare read, h={hidden}",
              reference=median([a / b for a, b in zip(taken["peft"], taken["read"], strict=True)]),
              note=f"{size}; load_file maps the file and reads none of it"),
        ratio(f"load and touch / load_file and touch, {hidden}", taken["veneer touched"], taken["read touched"],
              reference=median([a / b for a, b in zip(taken["peft touched"], taken["read touched"], strict=True)]),
              note=f"{size}; every page of the tensors is read"),
    ]  # fmt: skip
    lost = {name: float(not survives(name, model, folder)) for name, model in models.items()}
    made.append(Figure(f"a loaded adapter outlives changes to its file, {hidden}", lost["veneer"], lost["veneer"],
                       lost["veneer"], "bool", bar=0.0, reference=lost["peft"],
                       note="the file is rewritten in place, as cp and rsync --inplace do"))  # fmt: skip
    base = models["veneer"].unload()
    growth = []
    for i in range(4 if quick else 16):
        fresh = veneer.get_peft_model(base, veneer.LoraConfig(target_modules="all-linear"))
        gc.collect()
        for _ in range(5):  # else the 1st pays for cold caches, and the ratio flatters
            fresh.load_adapter(folder, "warm")
            fresh.delete_adapter("warm")
        times = [seconds(partial(fresh.load_adapter, folder, f"n{n}")) for n in range(42)]
        if i:
            growth.append(median(times[39:42]) / median(times[:3]))
        fresh.unload()
        del fresh
    note = "medians of the 40th to 42nd and of the 1st to 3rd"
    more = {"bar": 1.1, "note": note, "row": f"41st adapter loaded ÷ 1st, h={hidden}"}
    if not quick:  # once: it takes peft long
        times = [seconds(partial(models["peft"].load_adapter, folder, f"n{n}")) for n in range(42)]
        more["reference"] = median(times[39:42]) / median(times[:3])
    made.append(figure(f"load the 41st / the 1st, {hidden}", growth, "ratio", **more))
    return made


def survives(name: str, model: Any, folder: str) -> bool:
    """Whether an adapter that was loaded stays as it was while its file is overwritten in place."""
    path = Path(folder) / "adapter_model.safetensors"
    content = path.read_bytes()
    model.load_adapter(folder, "x")
    before = {k: t.detach().clone() for k, t in tensors(name, model)}
    start = 8 + int.from_bytes(content[:8], "little")  # the tensors begin after the header and its length
    try:
        with open(path, "r+b") as file:  # same length: a shorter file would kill the process
            file.seek(start)
            file.write(bytes(len(content) - start))
        same = all(torch.equal(t, before[k]) for k, t in tensors(name, model))
    finally:
        with open(path, "r+b") as file:
            file.write(content)
    model.delete_adapter("x")
    return same


def tensors(name: str, model: Any, adapter: str = "x") -> Iterable[tuple[str, Tensor]]:
    """An adapter's live tensors by their key in the file."""
    if name == "veneer":
        yield from adapter_files.named_tensors(model, adapter)
    else:
        for key, value in model.named_parameters():
            if f".{adapter}." in key:
                key = key.replace(f".{adapter}.", ".")
                yield key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"), value


def touch(values: Iterable[Tensor]) -> None:
    """Read a number of each page."""
    for value in values:
        value.detach().view(-1)[::1024].sum()


@bench
def switching(quick: bool) -> list[Figure]:
    """set_adapter with 560 sites."""
    ids = torch.arange(8)[None]
    with tempfile.TemporaryDirectory() as folder:
        models, wanted, _ = two_adapters(folder)
        for adapter in "abab":
            for name, model in models.items():
                model.set_adapter(adapter)
                if relative(model(ids).logits, wanted[adapter]) > 1e-4:
                    raise Red("switching", [f"{name}: after set_adapter({adapter!r}) the outputs are not its own"])
        if relative(wanted["a"], wanted["b"]) < 1e-2:
            raise Red("switching", ["the two adapters do the same"])
    times: dict[str, list[float]] = {"veneer": [], "peft": [], "both": []}
    gc.collect()
    for i in range(20 if quick else 200):
        chosen = "ab"[i % 2]
        times["veneer"].append(seconds(partial(models["veneer"].set_adapter, chosen)) * 1e6)
        if i % 5 == 0:
            times["peft"].append(seconds(partial(models["peft"].set_adapter, "ab"[i // 5 % 2])) * 1e6)
            times["both"].append(seconds(partial(models["veneer"].set_adapter, ["a", "b"])) * 1e6)
    return [
        figure("switch at 560 sites", times["veneer"], "us", bar=20.0, reference=median(times["peft"])),
        figure("switch to two stacked adapters, 560 sites", times["both"], "us"),
    ]


def two_adapters(folder: str) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """A model of 560 sites with adapters a and b, in both libraries; what it puts out with each; the base model."""
    ids = torch.arange(8)[None]
    wanted, base = {}, real(THIN_70B).requires_grad_(False)
    for seed, adapter in enumerate("ab"):
        made = peft.get_peft_model(twin(base), peft.LoraConfig(target_modules="all-linear"))
        scramble(made, seed)
        made.save_pretrained(f"{folder}/{adapter}")
        wanted[adapter] = made.eval()(ids).logits.detach()
    models = {}
    for name, library in LIBRARIES.items():
        models[name] = library.PeftModel.from_pretrained(twin(base), f"{folder}/a", "a", is_trainable=True).eval()
        models[name].load_adapter(f"{folder}/b", "b", is_trainable=True)
    return models, wanted, base


@bench
def overhead(quick: bool) -> list[Figure]:
    """What an adapted linear adds to a forward beside its arithmetic: 560 of them, too small to matter."""
    ids = torch.arange(8)[None]
    with tempfile.TemporaryDirectory() as folder:
        models, wanted, base = two_adapters(folder)
        models["floor"] = base
        for name in LIBRARIES:
            models[name].set_adapter("a")
            if relative(models[name](ids).logits, wanted["a"]) > 1e-4:
                raise Red("overhead", [f"{name}: the outputs are not the adapter's"])
    with threads(1), torch.no_grad():
        runs = {n: partial(m, input_ids=ids, use_cache=False) for n, m in models.items()}
        taken = interleaved(runs, 10 if quick else 40, warmup=3)
    extra = {n: [(x - y) / 560 * 1e6 for x, y in zip(taken[n], taken["floor"], strict=True)] for n in LIBRARIES}
    note = f"one thread; the whole forward takes {median(taken['floor']) * 1e3:.0f} ms without adapters"
    reference = median(extra["peft"])
    return [figure("forward overhead of an adapted linear", extra["veneer"], "us", reference=reference, note=note)]
