"""Files of strangers and of accidents: refused with a message, never run, never half read."""

from __future__ import annotations

import json
import pickle
import re
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import veneer
from small import llama, lora
from soak import hostile
from veneer.files import adapter_files
from veneer.io import locate, safe_read
from veneer.io.safe_read import NotFiniteWarning
from veneer.methods.base import PeftConfig
from veneer.targets import regex

SOURCE = Path(veneer.__file__).parent


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lora().save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def load(folder: Path, **options: Any) -> Any:
    return veneer.PeftModel.from_pretrained(llama(), folder, **options)


def test_mutated_folders_at_a_small_size() -> None:
    figures = hostile.mutated_folders(400, seed=1)
    assert figures["ok"], figures
    assert figures["refused"] > 250 and figures["corpus"] > 5


def test_mutations_that_are_not_refused_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: without checksums it reports silent loads, without the checks of JSON crashes."""
    monkeypatch.setattr(safe_read, "tensor_checksum", lambda header, data: "0" * 32)
    figures = hostile.mutated_folders(300, seed=1)
    assert any("without a word" in w for w in figures["wrong"])


def test_a_flipped_bit_of_a_tensor(saved: Path) -> None:
    path = saved / locate.WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged: its tensors are not those that were written \(checksum\)"):
        load(saved)
    save_file(
        load_file(path), path, metadata={"format": "pt"}
    )  # as whoever changes it on purpose, and as peft, saves it
    load(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_flagged(saved: Path, dtype: torch.dtype) -> None:
    path = saved / locate.WEIGHTS_NAME
    tensors = {k: v.to(dtype) for k, v in load_file(path).items()}
    key = sorted(tensors)[3]
    tensors[key][0, 1] = torch.inf
    save_file(tensors, path)
    with pytest.warns(NotFiniteWarning, match=re.escape(f"{key} and 0 more of {len(tensors)} tensors")):
        load(saved)
    tensors[key][0, 1] = torch.finfo(dtype).max  # large is not infinite, even where a sum of it is
    tensors[key][1, 1] = torch.finfo(dtype).max
    save_file(tensors, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(saved)


def rewritten(path: Path, change: Any) -> None:
    header, data = hostile.split(path.read_bytes())
    header.pop("__metadata__")
    path.write_bytes(hostile.joined(change(header) or header, data))


HEADERS: dict[str, tuple[Any, str]] = {
    "overlap": (
        lambda h: list(h.values())[1].update(list(h.values())[0]),
        "begins at byte 0, and what is before it ends at",
    ),
    "gap": (lambda h: h.pop(next(iter(h))), "begins at byte"),
    "huge": (lambda h: next(iter(h.values())).update(shape=[2**40, 2**20]), "in F32 has 768 bytes"),
    "negative": (lambda h: next(iter(h.values())).update(shape=[-4, 4]), "has the shape"),
    "unknown dtype": (lambda h: next(iter(h.values())).update(dtype="PICKLE"), "is described as"),
    "not an object": (lambda h: [1], "its header is no object"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_held_against_the_file(name: str, saved: Path) -> None:
    change, message = HEADERS[name]
    rewritten(
        saved / locate.WEIGHTS_NAME,
        lambda h: r if isinstance(r := change(h), list) and name == "not an object" else None,
    )
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_a_header_longer_than_the_file(saved: Path) -> None:
    path = saved / locate.WEIGHTS_NAME
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="says that its header has 4,611,686,018,427,387,904 bytes"):
        load(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": 8, "r": 4}', "the key 'r' stands twice"),
        ('{"r": NaN}', "NaN is no number"),
        ('{"r": 1e999}', "larger than any float"),
        ("[" * 100_000, "nested deeper than 32"),
        ('{"a": ' * 40 + "1" + "}" * 40, "nested deeper than 32"),
        ("[]", "holds a list"),
        ("\ufeff{}", "no valid JSON"),
        ('{"peft_type": "LORA", "r": 1000000000, "target_modules": ["q_proj"]}', "r=1000000000: 65,536 is the most"),
        ('{"peft_type": "LORA", "r": "8", "target_modules": ["q_proj"]}', "r='8': must be of the type int"),
        ('{"peft_type": "LORA", "r": true, "target_modules": ["q_proj"]}', "must be of the type int"),
        ('{"peft_type": "LORA", "target_modules": {"a": 1}}', r"must be of the type list\[str\] | str | null"),
        ('{"peft_type": "LORA", "target_modules": "a\\u0000b"}', "none of them NUL"),
    ],
)  # fmt: skip
def test_configs_of_strangers(text: str, message: str, saved: Path) -> None:
    (saved / locate.CONFIG_NAME).write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_a_config_of_megabytes_is_not_read(saved: Path) -> None:
    (saved / locate.CONFIG_NAME).write_text(" " * (17 << 20) + "{}")
    with pytest.raises(ValueError, match="it was not read"):
        load(saved)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_expressions_that_take_forever_do_not(field: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "SECONDS", 0.3)
    regex.compile_pattern.cache_clear()
    values = json.loads((saved / locate.CONFIG_NAME).read_text())
    evil = r"([a-z]|[a-z._0-9]|\w)+[A-Z]+$"  # which even regex takes forever for
    values[field] = {evil: 4} if field == "rank_pattern" else [evil] if field == "modules_to_save" else evil
    (saved / locate.CONFIG_NAME).write_text(json.dumps(values))
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"matching takes more than 0.3 s|modules_to_save"):
            load(saved)
    assert time.perf_counter() - started < 20
    regex.compile_pattern.cache_clear()


PLAIN = (
    r".*\.(q|v)_proj",
    r"model\.layers\.\d+\.self_attn\.q_proj",
    r"(?:.*\.)?lora",
    r"[+*]a",
    r"a\+\*b",
    r"x{2,3}",
    r".*a.*b.*",
    "(a|b)c",
    r"(?P<x>a|b)(?P=x)",
    r"[\s\S]*q",
)
RISKY = (r"(a+)+", r"(a|a)*b", r"(\w+\.)*q", r".*.*.*.*x", r"(a)\1", r"(?:a*)*", r"(a{2,}){3,}", r"((a)*b)+")
# What means more to the package regex than to re: allowed errors, classes of POSIX.
LITERAL = ("a{e}", "(?:q){e<=1}", "a{1", r"\{e}", "a{,}", r"\N{DIGIT ONE}", "[[:alpha:]]", "[[:alpha:]+", "x[:a]")
NAMES = ("aaa", "q", "a.q", "aab", "xx", "x", "", "b", "a{e}", "a{1", "{e}", "1", "a]", ":]", "x:", "bc", "aa", "model.lora",
         "model.layers.10.self_attn.q_proj", "model.layers.0.q_proj")  # fmt: skip


def same_matches(pattern: str, names: Iterable[str] = NAMES) -> None:
    """The expression finds in each name what re finds."""
    found = regex.compile_pattern(pattern, "target_modules")
    for name in names:
        for how in ("match", "fullmatch"):
            ours, theirs = (getattr(p, how)(name) for p in (found, re.compile(pattern)))
            assert (ours and ours.span()) == (theirs and theirs.span()), (pattern, name, how)
            assert not ours or ours.groupdict() == theirs.groupdict()


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize("pattern", PLAIN + RISKY + LITERAL)
def test_expressions_mean_what_they_mean_to_re(pattern: str) -> None:
    same_matches(pattern)


@pytest.mark.filterwarnings("ignore:Possible")
@settings(max_examples=300, deadline=None)
@given(st.text("ab.|*+?()[]{}\\,1^$e<=:-", max_size=12))
def test_every_expression_matches_as_with_re_or_is_refused(pattern: str) -> None:
    try:
        regex.compile_pattern(pattern, "target_modules")
    except ValueError as error:
        assert "no valid regular expression" in str(error)  # noqa: PT017
        return
    same_matches(pattern, ("a.b", "ab", "", "a{e}", "1:"))


def test_quick_matches_take_no_time_off_an_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long process matches one expression on many models."""
    monkeypatch.setattr(regex, "SECONDS", 0.05)
    monkeypatch.setattr(regex, "FREE", 0.01)
    found = regex.BoundedPattern(r".*\.q_proj", "target_modules", "")
    started = time.perf_counter()
    while time.perf_counter() - started < 0.3:
        assert found.fullmatch("model.layers.0.self_attn.q_proj")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(veneer.LoraConfig(r=4, target_modules=["q_proj"]).to_dict())), JSON)
def test_any_value_in_any_field(name: str, value: Any) -> None:
    """A config with it is read as what it says, or refused."""
    values = {**veneer.LoraConfig(r=4, target_modules=["q_proj"]).to_dict(), name: value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = PeftConfig.from_dict(values)
        except ValueError as error:
            assert str(error).startswith("config: ") or "LoraConfig(" in str(error)  # noqa: PT017
            return
    if name not in ("peft_version", "target_modules", "exclude_modules") and hasattr(config, name):
        held = getattr(config, name)
        assert held == value or not value


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4))
def test_what_is_packed_is_what_is_read(shapes: dict[str, list[int]]) -> None:
    tensors = {k: torch.arange(max(1, n)).reshape(-1).float() for k, s in shapes.items() for n in [sum(s)]}
    tensors.pop("__metadata__", None)
    if not tensors:
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(adapter_files.to_safetensors_bytes(tensors))
        safe_read.load_tensors(path)
        found = locate.read_tensors(path)
        assert found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", "a\\..\\x", "a:b", "a.b", "", " a", "__base__"])
def test_names_that_lead_out(name: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter name"):
        load(saved).load_adapter(saved, name)
    (saved / locate.SET_NAME).write_text(json.dumps({"adapters": ["default", name], "active": ["default"]}))
    if name not in (" a", "__base__"):
        with pytest.raises(ValueError, match="names of adapters must be"):
            load(saved, adapters="all")
    before = sorted(p.name for p in tmp_path.iterdir())
    for folder in ("..", "../a", str(saved), "x/../../a"):
        with pytest.raises(ValueError, match="must be a path inside"):
            load(saved / "sub", subfolder=folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["adapter_model.bin", locate.WEIGHTS_NAME])
def test_pickles_do_not_run(name: str, saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (saved / locate.WEIGHTS_NAME).unlink()
    (saved / name).write_bytes(pickle.dumps(hostile.Runs(str(trap))))
    with pytest.raises(ValueError, match=r"cannot be read as plain tensors|is damaged"):
        load(saved)
    assert not trap.exists()


def test_classes_outside_of_transformers_are_not_imported(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    values = json.loads((saved / locate.CONFIG_NAME).read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    values |= {"auto_mapping": {"parent_library": "evil", "base_model_class": "X"}, "base_model_name_or_path": "x/y"}
    (saved / locate.CONFIG_NAME).write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="load that model yourself"):
            veneer.AutoPeftModel.from_pretrained(saved)


def test_we_run_no_code_of_files() -> None:
    """No trust_remote_code is set, nothing is unpickled without weights_only, evaluated or run through a shell."""
    bad = re.compile(
        r"trust_remote_code\s*=|pickle\.loads?\(|\beval\((?!\))|\bexec\(|os\.system|shell\s*=\s*True|yaml\.load\(|marshal|joblib"
    )
    found = []
    for path in SOURCE.rglob("*.py"):
        text = path.read_text("utf-8")
        found += [f"{path.relative_to(SOURCE)}: {m[0]}" for m in bad.finditer(text)]
        for call in re.finditer(r"torch\.load\([^)]*\)", text):
            found += [] if "weights_only=True" in call[0] else [call[0]]
    assert not found


def test_a_changed_config_is_said(saved: Path) -> None:
    values = json.loads((saved / locate.CONFIG_NAME).read_text())
    (saved / locate.CONFIG_NAME).write_text(
        json.dumps({**values, "lora_alpha": 32, "base_model_name_or_path": "other"})
    )
    with pytest.warns(
        locate.ConfigChangedWarning, match="were saved: lora_alpha; the adapter computes what the file says"
    ):
        load(saved)
