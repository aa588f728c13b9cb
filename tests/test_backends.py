"""Every method on every storage format of a linear layer, against the same method on the dequantized weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer
from backends import FORMATS, IN, OUT, PackedLinear, linear
from table import METHODS, NAME, Model
from veneer import layers
from veneer.backends import backend_of

NOT_LINEAR = {"tokens", "ln_tuning"}  # of embeddings, and of norms
OWN_TENSORS = {"bitfit", "modules_to_save"}  # train what a quantized layer may not hold as parameters
HERE = [n for n, f in FORMATS.items() if f.installed]
RUNS = [n for n in HERE if FORMATS[n].runs]
ON_LINEAR = [m for m in METHODS if m not in NOT_LINEAR]
REFUSED = [
    (m, f) for m in sorted(OWN_TENSORS) for f in RUNS if m == "modules_to_save" or FORMATS[f].bias_is_no_parameter
]
CELLS = [(m, f) for m in ON_LINEAR for f in RUNS if (m, f) not in REFUSED]
cells = pytest.mark.parametrize(("method", "backend"), CELLS)
MERGING = [c for c in CELLS if METHODS[c[0]].merges]
merging = pytest.mark.parametrize(("method", "backend"), MERGING)


def x_of(requires_grad: bool = False) -> torch.Tensor:
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(3))
    return x.requires_grad_(requires_grad)


def plain(backend: str) -> nn.Linear:
    """A layer of the weight that the quantized one computes with."""
    made, layer = linear(), FORMATS[backend].make(linear())
    made.weight.data = FORMATS[backend].weight(layer).clone()
    return made


def with_adapter(method: str, layer: nn.Module, *, scramble: bool = True) -> Any:
    torch.manual_seed(0)
    adapted = veneer.get_peft_model(Model(layer).eval(), METHODS[method].make(target_modules=[NAME]))
    if scramble:
        randomise(adapted)
    return adapted.eval()


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert ":" in name, f"{name} of the base is trained"
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def same_adapter(method: str, backend: str) -> tuple[Any, Any]:
    """A method on the quantized layer and on the plain one, with the same tensors."""
    quantized = with_adapter(method, FORMATS[backend].make(linear()))
    dense = with_adapter(method, plain(backend), scramble=False)
    veneer.set_peft_model_state_dict(dense, veneer.get_peft_model_state_dict(quantized))
    return quantized, dense.eval()


def linear_of(layer: nn.Linear) -> nn.Linear:
    made = linear()
    made.load_state_dict(layer.state_dict())
    return made


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-6))


def bits(layer: nn.Module) -> dict[str, Any]:
    """All that a layer stores, an adapter's tensors aside, bit for bit."""
    found: dict[str, Any] = {}
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **vars(layer).get("meta", {})}
    for name, value in tensors.items():
        if ":" in name or not isinstance(value, torch.Tensor):
            continue
        parts = inner(value)
        found |= {f"{name}.{k}": v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in parts.items()}
    return found


def inner(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors in a tensor subclass."""
    if not hasattr(value, "__tensor_flatten__") or type(value) in (torch.Tensor, nn.Parameter):
        return {"": value.detach().reshape(-1) if value.ndim == 0 else value.detach()}
    names = value.__tensor_flatten__()[0]
    return {f"{n}.{k}": v for n in names for k, v in inner(getattr(value, n)).items()}


@cells
def test_outputs_and_gradients_are_those_on_the_dequantized_weight(method: str, backend: str) -> None:
    quantized, dense = same_adapter(method, backend)
    near = max(1e-4, FORMATS[backend].near)
    grads = []
    for model in (quantized, dense):
        x = x_of(True)
        y = model(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        grads.append((y, x.grad, trained))
    (y, gx, ours), (expected, expected_gx, theirs) = grads
    assert relative(y, expected) <= near
    assert relative(gx, expected_gx) <= near
    assert ours.keys() == theirs.keys() and ours
    for name, grad in theirs.items():
        assert grad is not None and ours[name] is not None, f"{name} got no gradient"
        assert relative(ours[name], grad) <= near, name


@merging
def test_merge(method: str, backend: str) -> None:
    """Merged, the layer is what the library makes of the merged weight; unmerged, it has its exact bits again."""
    row, x = FORMATS[backend], x_of()
    quantized, dense = same_adapter(method, backend)
    layer = quantized.get_base_model().layer
    before, start = quantized(x), bits(layer)
    if not row.writes and method != "bitfit":
        with pytest.raises(ValueError, match="dequantize=True"):
            quantized.merge_adapter()
        assert bits(layer) == start and torch.equal(quantized(x), before)
        return
    weight = row.weight(layer)
    dense.merge_adapter()
    merged = linear()
    merged.load_state_dict(dense.get_base_model().layer.state_dict(), strict=False)
    if not torch.equal(merged.weight, weight):  # else it stays as it is stored
        weight = row.weight(row.make(linear_of(merged)))
    expected = torch.tanh(F.linear(x, weight, merged.bias))
    quantized.merge_adapter()
    assert relative(quantized(x), expected) <= max(1e-4, row.near)
    quantized.unmerge_adapter()
    assert bits(layer) == start
    assert torch.equal(quantized(x), before)


@merging
def test_merge_into_the_dequantized_weight(method: str, backend: str) -> None:
    quantized, _ = same_adapter(method, backend)
    expected = quantized(x_of())
    made = quantized.merge_and_unload(dequantize=True)
    assert type(made.layer) is nn.Linear and made.layer.weight.dtype == torch.float32
    assert relative(made(x_of()), expected) <= max(1e-5, FORMATS[backend].near)


@cells
def test_files_go_to_the_plain_base_and_back(method: str, backend: str, tmp_path: Any) -> None:
    quantized, dense = same_adapter(method, backend)
    expected = quantized(x_of()), dense(x_of())
    quantized.save_pretrained(tmp_path / "quantized")
    dense.save_pretrained(tmp_path / "plain")
    for folder, layer, want in (
        ("quantized", plain(backend), expected[1]),
        ("plain", FORMATS[backend].make(linear()), expected[0]),
    ):
        loaded = veneer.PeftModel.from_pretrained(Model(layer).eval(), tmp_path / folder).eval()
        assert relative(loaded(x_of()), want) <= 1e-6


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "oft", "vera", "loha", "bottleneck"])
def test_loss_falls(method: str, backend: str) -> None:
    model = with_adapter(method, FORMATS[backend].make(linear()), scramble=False).train()
    x, target = x_of(), torch.tanh(torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(4)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def name_of(layer: nn.Module) -> str:
    kind = layers.kind_of(layer)
    assert kind is not None and (kind.measure(layer, "weight").fan_in, kind.measure(layer, "weight").fan_out) == (
        IN,
        OUT,
    )
    return kind.weight_of(layer)


@pytest.mark.parametrize(("method", "backend"), REFUSED)
def test_what_a_layer_does_not_hold_is_refused(method: str, backend: str) -> None:
    model = Model(FORMATS[backend].make(linear()))
    model.other = nn.Linear(2, 2)
    target = "other" if method == "modules_to_save" else NAME
    with pytest.raises(ValueError, match="no bias to train|a bias of their own|a copy of it cannot be trained"):
        veneer.get_peft_model(model, METHODS[method].make(target_modules=[target]))
    assert type(model.layer) is type(FORMATS[backend].make(linear())), "something was left behind"


@pytest.mark.parametrize("backend", HERE)
def test_read_is_the_librarys_own(backend: str) -> None:
    layer = FORMATS[backend].make(linear())
    param = name_of(layer)
    found = backend_of(layer, param, "layer")
    assert relative(found.read(layer, param).float(), FORMATS[backend].weight(layer)) <= 1e-6
    assert found.can_write(layer, param) == FORMATS[backend].writes
    assert found.dtype(layer, param).is_floating_point


@pytest.mark.parametrize("backend", [n for n in HERE if FORMATS[n].writes])
def test_write_and_restore(backend: str) -> None:
    layer = FORMATS[backend].make(linear())
    param = name_of(layer)
    found, start, weight = backend_of(layer, param, "layer"), bits(layer), FORMATS[backend].weight(layer).clone()
    other = linear(seed=5)
    token = found.write(layer, param, other.weight.detach() * 3)
    other.weight.data *= 3
    again = FORMATS[backend].weight(FORMATS[backend].make(other))
    assert relative(found.read(layer, param).float(), again) <= 1e-6
    assert relative(found.before(layer, param, token).float(), weight) <= 1e-6
    found.restore(layer, param, token)
    assert bits(layer) == start


def test_a_quantized_layer_of_another_kind_is_refused_by_name() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Embedding(12, 64).requires_grad_(False)
    torchao.quantize_(layer, torchao.IntxWeightOnlyConfig(), filter_fn=lambda module, name: module is layer)
    with pytest.raises(
        TypeError, match="layer: Embedding.weight is stored as torchao, which only the forward of a linear"
    ):
        with_adapter("lora", layer)


@pytest.mark.parametrize("bits_", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq_layout(bits_: int, version: int, shuffled: bool) -> None:
    layer = PackedLinear(linear(), bits_, version=version, shuffled=shuffled)
    found = backend_of(layer, "qweight", "layer")
    assert found.name == "GPTQ"
    assert relative(found.read(layer, "qweight"), layer.known) <= 1e-6


def test_a_layout_that_cannot_be_read_says_so() -> None:
    layer = PackedLinear(linear(), 4)
    layer.QUANT_TYPE = "marlin"
    model = with_adapter("lora", layer)  # which needs no weight
    with pytest.raises(TypeError, match="'marlin' keeps the weight in a layout of its own.*backend=\"torch\""):
        model.merge_and_unload(dequantize=True)


class Compressed(nn.Linear):
    """As layers of compressed-tensors: an nn.Linear without its weight."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        del self._parameters["weight"]
        self.weight_packed = nn.Parameter(torch.zeros(OUT, IN // 8, dtype=torch.int32), requires_grad=False)


def bitnet() -> nn.Module:
    from transformers.integrations.bitnet import BitLinear

    made: nn.Module = BitLinear(IN, OUT, True, dtype=torch.float32)
    return made


@pytest.mark.parametrize("targets", [[NAME], "all-linear"], ids=["named", "all-linear"])
@pytest.mark.parametrize(
    ("make", "held"), [(bitnet, "BitLinear.weight .*uint8"), (Compressed, "Compressed.weight .*nothing")]
)
def test_a_layer_of_a_library_that_no_backend_knows(make: Any, held: str, targets: Any) -> None:
    model = Model(make())
    model.head = nn.Linear(4, 4)
    where = r"target_modules, or add a backend: one file in veneer/backends/"
    with pytest.raises(TypeError, match=rf"layer: no weight backend reads {held}.*{where}"):
        veneer.get_peft_model(model, veneer.LoraConfig(target_modules=targets))
    model = veneer.get_peft_model(model, veneer.LoraConfig(target_modules="all-linear", exclude_modules=[NAME]))
    assert model.peft_config["default"].target_modules == {"head"}
