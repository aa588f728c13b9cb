"""Adapter folders that accidents and strangers made: refused with our own error, or what was saved; never something else.

A folder is mutated and loaded. Allowed are a ValueError that Veneer raises itself, the very tensors and config that were
saved, or a warning that says what changed. What reaches new lines of the readers is kept and mutated further, which is what
coverage-guided fuzzers such as atheris do (it has no build for this Python).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import veneer
from small import bits, llama, scramble
from veneer.io import locate

SOURCE = str(Path(veneer.__file__).parent)
READERS = tuple(
    f"{SOURCE}/{n}.py"
    for n in (
        "files/adapter_files", "files/state_dict", "io/locate", "io/safe_read", "io/fingerprint", "targets/regex",
        "targets/select", "methods/base", "methods/config_file", "lifecycle/plan", "lifecycle/find_sites",
    )
)  # fmt: skip
CONFIG, WEIGHTS = locate.CONFIG_NAME, locate.WEIGHTS_NAME
Files = dict[str, bytes]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**16 + 1, 10**12, 2**63, -(2**63), 0.5, -0.0, 1e300, "", "x", "8", "../../outside", "/etc/passwd",
    "(a+)+$", "(.*)*(.*)*(.*)*x", "[", "\\", "a" * 200_000, "\x00", "🦜", [], [[]], {}, {"a": {}}, ["q_proj", 3], ["q_proj"], {"q_proj": 10**9},
    {"(a|a)*b": 4}, {"q_proj": "4"}, [None], list(range(1000)), "all-linear", "LORA", "gaussian", "eva", "__import__('os')",
]  # fmt: skip


def configs() -> dict[str, Any]:
    return {
        "lora": veneer.LoraConfig(
            r=4, target_modules="all-linear", rank_pattern={"q_proj": 2}, layers_to_transform=[0]
        ),
        "dora": veneer.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True, modules_to_save=["lm_head"]),
        "ia3": veneer.IA3Config(task_type="CAUSAL_LM"),
        "vera": veneer.VeraConfig(r=4, target_modules=["q_proj", "k_proj"], save_projection=False),
        "loha": veneer.LoHaConfig(r=2, target_modules=r".*\.(up|down)_proj"),
        "prompt": veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": veneer.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "norm": veneer.LNTuningConfig(task_type="CAUSAL_LM"),
    }


def saved(folder: Path) -> dict[str, tuple[Files, Any, dict[str, torch.Tensor]]]:
    """Files, config and tensors of adapters of several methods."""
    found = {}
    for name, config in configs().items():
        model = veneer.get_peft_model(llama(1), config)
        scramble(model)
        model.save_pretrained(folder / name)
        files = {n: (folder / name / n).read_bytes() for n in (CONFIG, WEIGHTS)}
        held = veneer.PeftModel.from_pretrained(llama(1), folder / name)
        found[name] = files, held.peft_config["default"], veneer.get_peft_model_state_dict(held)
    return found


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file; raises where a mutation left none."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: Any, data: bytes, text: bytes | None = None) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode() if text is None else text
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def flip(data: bytes, rng: random.Random, start: int = 0) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        made[rng.randrange(start, len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    header, tensors = split(data)
    keys = [k for k in header if k != "__metadata__"]
    a, b = rng.choice(keys), rng.choice(keys)
    entry = header[a]
    kind = rng.randrange(12)
    if kind == 0:  # swapped keys
        header[a], header[b] = header[b], header[a]
    elif kind == 1:
        header[rng.choice((a + "x", "../" + a, "", a.replace("0", "1"), "\x00", "lora_A"))] = header.pop(a)
    elif kind == 2:
        entry["dtype"] = rng.choice(("F16", "BF16", "I32", "F64", "F8_E4M3", "X", None, 3))
    elif kind == 3:
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [2**40, 2**40], [-1], [], None, "x", [*entry["shape"], 1], [1.5])
        )
    elif kind == 4:
        entry["data_offsets"] = rng.choice(
            (header[b]["data_offsets"], [0, 2**60], [-8, 0], [8, 0], [], None, [0, len(tensors)])
        )
    elif kind == 5:
        header[a] = rng.choice((None, [], "x", {}, {"dtype": "F32"}))
    elif kind == 6:
        header["__metadata__"] = rng.choice(
            (None, [], {"format": 3}, {"format": "pt", "veneer.base": "{"}, {"veneer.fields": "[]"})
        )
    elif kind == 7:  # a key that stands twice
        text = json.dumps(header, separators=(",", ":"))
        return joined(None, tensors, (text[:-1] + f",{json.dumps(a)}:{json.dumps(header[b])}" + "}").encode())
    elif kind == 8:
        return joined(None, tensors, b'{"a":' * rng.choice((10, 1000, 100_000)))
    elif kind == 9:
        header.pop(a)
    elif kind == 10:
        header["more"] = dict(entry)
    else:
        return rng.choice((2**63, 2**40, len(data), 0, 1)).to_bytes(8, "little") + data[8:]
    return joined(header, tensors)


def mutate_data(data: bytes, rng: random.Random) -> bytes:
    begin = 8 + int.from_bytes(data[:8], "little")
    size = len(data) - begin
    made = bytearray(data)
    at, other = begin + rng.randrange(size), begin + rng.randrange(size)
    n = rng.choice((4, 64, 512))
    kind = rng.randrange(4)
    if kind == 0:
        return flip(data, rng, begin)
    if kind == 1:
        made[at : at + n] = bytes(len(made[at : at + n]))
    elif kind == 2:  # two pieces change places
        n = min(n, len(made) - max(at, other))
        made[at : at + n], made[other : other + n] = data[other : other + n], data[at : at + n]
    else:
        made[at : at + 4] = b"\x00\x00\xc0\x7f"[: len(made) - at]  # NaN
    return bytes(made)


def mutate_config(data: bytes, rng: random.Random) -> bytes:
    values = json.loads(data)
    key = rng.choice(list(values))
    kind = rng.randrange(9)
    if kind < 4:
        values[key] = rng.choice(VALUES)
    elif kind == 4:
        values.pop(key)
    elif kind == 5:
        values[rng.choice(("surprise", key + "_", "__class__", ""))] = rng.choice(VALUES)
    elif kind == 6:
        text = json.dumps(values)
        return (text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(VALUES))}" + "}").encode()
    elif kind == 7:
        return rng.choice(
            (
                b"[" * 100_000,
                b"[]",
                b"null",
                b"",
                b"\xff\xfe{}",
                b"{}",
                b'{"r": NaN}',
                b'{"r": 1e999}',
                b"\xef\xbb\xbf" + data,
                b" " * (17 << 20),
            )
        )
    else:
        return (
            json.dumps(values)
            .replace(
                f'"{key}": ', f'"{key}": {rng.choice(("NaN", "Infinity", "1e999", "[" * 40 + "]" * 40, "0x10", "-"))} '
            )
            .encode()
        )
    return json.dumps(values).encode()


class Runs:
    """What would run, were it ever unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def mutate(files: Files, rng: random.Random, trap: str) -> Files:
    """One change of an adapter's files."""
    made = dict(files)
    kind = rng.randrange(14)
    if kind < 4:
        made[CONFIG] = mutate_config(files[CONFIG], rng)
    elif kind < 7:
        made[WEIGHTS] = mutate_header(files[WEIGHTS], rng)
    elif kind < 9:
        made[WEIGHTS] = mutate_data(files[WEIGHTS], rng)
    elif kind < 11:
        name = rng.choice((CONFIG, WEIGHTS, WEIGHTS))
        made[name] = flip(files[name], rng)
    elif kind == 11:
        name = rng.choice((CONFIG, WEIGHTS))
        made[name] = (
            files[name][: rng.randrange(len(files[name]))] if rng.random() < 0.7 else files[name] + rng.randbytes(8)
        )
    elif kind == 12:
        made[WEIGHTS] = rng.choice(
            (b"", rng.randbytes(200), pickle.dumps(Runs(trap)), b"PK\x03\x04" + rng.randbytes(99))
        )
    elif rng.random() < 0.5:
        made["adapter_model.bin"] = rng.choice((pickle.dumps(Runs(trap)), rng.randbytes(99)))
        made.pop(WEIGHTS)
    else:
        made[locate.CERTIFICATE_NAME] = rng.choice((b"{", b"[]", b"[" * 100_000, b'{"format": 1}', rng.randbytes(50)))
    return made


class Eyes:
    """Writes, processes and connections while something is loaded, as Python's audit hook tells of them."""

    def __init__(self, folder: str) -> None:
        self.folder, self.open, self.seen = folder, False, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.open:
            return
        if event == "open":
            path, mode, flags = arguments
            written = (isinstance(mode, str) and set(mode) & set("wxa+")) or (flags or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            if not written or not isinstance(path, str | bytes | os.PathLike):
                return
        elif event not in (
            "os.rename",
            "os.remove",
            "os.mkdir",
            "subprocess.Popen",
            "os.system",
            "socket.connect",
            "os.symlink",
        ):
            return
        self.seen.append(f"{event} {arguments[0]!s}")


def mutated_folders(count: int, seed: int = 0) -> dict[str, Any]:
    """Load `count` mutated folders, and say what came of them."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        originals = saved(place / "originals")
        model = veneer.get_peft_model(llama(1), veneer.LoraConfig(r=2, target_modules=["o_proj"]))
        head = model.get_base_model().lm_head._parameters["weight"]
        plain = head.detach().clone()
        before = bits(model.get_base_model())
        folder, trap = place / "a", str(place / "trap")
        folder.mkdir()
        eyes = Eyes(str(folder))
        corpus: list[tuple[str, Files]] = []
        lines: set[tuple[str, int]] = set()
        for n in range(count):
            deep = bool(corpus) and rng.random() < 0.4
            name, files = (
                rng.choice(corpus) if deep else ((chosen := rng.choice(list(originals))), originals[chosen][0])
            )
            try:
                files = mutate(files, rng, trap)
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                IndexError,
                RecursionError,
            ):  # what it holds is too far gone for this change
                outcomes["not mutated further"] += 1
                continue
            for old in folder.iterdir():
                old.unlink()
            for file, data in files.items():
                (folder / file).write_bytes(data)
            started = time.perf_counter()
            outcome, what, new = one(model, folder, originals[name], deep, eyes, lines)
            slowest = max(slowest, time.perf_counter() - started)
            outcomes[outcome] += 1
            if outcome == "loaded, and said that it replaces the head":
                head.data.copy_(plain)
            if what:
                wrong.append(f"{n} {name}: {what}")
            if new and len(corpus) < 400:
                corpus.append((name, files))
            if eyes.seen or os.path.exists(trap):
                wrong.append(f"{n} {name}: it did {eyes.seen or 'run the pickle'}")
                eyes.seen.clear()
        if bits(model.get_base_model()) != before:
            wrong.append("the base model changed")
    return {
        "folders": count, **dict(outcomes), "corpus": len(corpus), "lines of the readers": len(lines),
        "slowest s": round(slowest, 2), "wrong": wrong[:20], "ok": not wrong,
    }  # fmt: skip


def one(
    model: Any,
    folder: Path,
    original: tuple[Files, Any, dict[str, torch.Tensor]],
    deep: bool,
    eyes: Eyes,
    lines: set[tuple[str, int]],
) -> tuple[str, str, bool]:
    """What came of one folder, what is wrong with that, and whether it reached new lines."""
    known = len(lines)
    with warnings.catch_warnings(record=True) as said, traced(lines):
        warnings.simplefilter("always")
        eyes.open = True
        try:
            model.load_adapter(folder, "x")
        except ValueError as error:
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            what = "" if last.startswith(SOURCE) else f"{error!r} is not raised by Veneer but in {last}"
            if list(model.peft_config) != ["default"]:
                what = f"{error!r} left {list(model.peft_config)}"
            return "refused", what, len(lines) > known
        except BaseException as error:
            return "crashed", "".join(traceback.format_exception(error)[-3:])[-600:], False
        finally:
            eyes.open = False
    _, config, tensors = original
    held = veneer.get_peft_model_state_dict(model, adapter_name="x")
    same = held.keys() == tensors.keys() and all(torch.equal(held[k], tensors[k]) for k in tensors)
    fields = [f.name for f in dataclasses.fields(config) if f.name not in locate.APART]
    got = model.peft_config["x"]
    alike = type(got) is type(config) and all(getattr(got, f) == getattr(config, f) for f in fields)
    model.delete_adapter("x")
    told = [str(w.message)[:200] for w in said if issubclass(w.category, UserWarning)]
    if same and alike:
        return "loaded as saved", "", len(lines) > known
    if any("which replace its own: base_model.model.lm_head.weight" in t for t in told):  # modules_to_save was lost
        return "loaded, and said that it replaces the head", "", len(lines) > known
    if told:
        said_so = alike or any("changed since" in t for t in told)
        return "loaded with a warning", "" if said_so else f"config changed, told {told}", len(lines) > known
    if deep:  # an earlier mutation took the checksum away, and then nobody can tell
        return "other, its checksum gone", "", len(lines) > known
    return "silent", f"other {'config' if same else 'tensors'} without a word", len(lines) > known


class traced:
    """Collects the lines of the readers that run."""

    def __init__(self, lines: set[tuple[str, int]]) -> None:
        self.lines = lines

    def __enter__(self) -> None:
        def local(frame: Any, event: str, argument: Any) -> Any:
            if event == "line":
                self.lines.add((frame.f_code.co_filename, frame.f_lineno))
            return local

        def calls(frame: Any, event: str, argument: Any) -> Any:
            return local if frame.f_code.co_filename in READERS else None

        self.before = sys.gettrace()
        sys.settrace(calls)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)


SCENARIOS: list[tuple[str, Callable[[int], dict[str, Any]], int, int, str]] = [
    ("mutated folders", mutated_folders, 10_000, 300, "0 crashes, 0 silent loads of wrong data, 0 writes"),
]
