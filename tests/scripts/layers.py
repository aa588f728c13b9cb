"""What scripts touch on peft's layers."""

import peft.utils.other
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, _get_submodules
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)  # fmt: skip
chosen = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"],
                    task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
model = get_peft_model(LlamaForCausalLM(config), chosen)
ids = torch.arange(8)[None]


def says():
    with torch.no_grad():
        return model(input_ids=ids).logits


layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
assert len(layers) == 4 and all(isinstance(m, BaseTunerLayer) and isinstance(m, Linear) for m in layers)
assert sum(isinstance(m, ModulesToSaveWrapper) for m in model.modules()) == 1
assert isinstance(model, PeftModel) and isinstance(model, PeftModelForCausalLM)
assert not isinstance(model, PeftModelForSeq2SeqLM)
layer = layers[0]
assert layer.r == {"default": 4} and layer.scaling["default"] == 2.0 and layer.lora_alpha["default"] == 8
assert layer.lora_A["default"].weight.shape == (4, 32) and "default" in layer.lora_B and len(layer.lora_A) == 1
assert list(layer.active_adapters) == ["default"] and not layer.merged and layer.merged_adapters == []
assert not layer.disable_adapters and not hasattr(layer.base_layer, "base_layer")
assert torch.equal(layer.base_layer.weight, layer.get_base_layer().weight)
first = says()
wanted = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
torch.testing.assert_close(layer.get_delta_weight("default"), wanted)

for m in layers:
    m.set_scale("default", 0.5)
half = says()
assert layer.scaling["default"] == 1.0 and not torch.allclose(half, first)
for m in layers:
    m.scale_layer(2)
torch.testing.assert_close(says(), first)
for m in layers:
    m.set_scale("default", 0)
    m.scaling["default"] = 1.0
torch.testing.assert_close(says(), half)
for m in layers:
    m.unscale_layer()
torch.testing.assert_close(says(), first)
with rescale_adapter_scale(model, 0.5):
    torch.testing.assert_close(says(), half)
torch.testing.assert_close(says(), first)

for m in layers:
    m.merge()
assert layer.merged
torch.testing.assert_close(says(), first, atol=1e-4, rtol=1e-4)
for m in layers:
    m.unmerge()
torch.testing.assert_close(says(), first)

with torch.no_grad():
    layer.lora_B["default"].weight.zero_()
assert not torch.allclose(says(), first)
parent, target, name = _get_submodules(model, "base_model.model.model.layers.0.self_attn")
assert name == "self_attn" and parent.self_attn is target
policy = peft.utils.other.fsdp_auto_wrap_policy(model)
assert policy(module=model.base_model.model.model.layers[0], recurse=False, nonwrapped_numel=1)
if "veneer" in peft.__file__:
    try:
        AdaLoraConfig(r=3)
    except NotImplementedError as error:
        assert "AdaLoraConfig is not in Veneer yet" in str(error)
    else:
        raise AssertionError("a method that is not there was made")
