"""Adapters on a model as peft's documentation uses them: several, saved, loaded, combined, swapped, looked at."""

import tempfile
from pathlib import Path

import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = Path(tempfile.mkdtemp())
ids = torch.arange(8)[None]
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, pad_token_id=0)  # fmt: skip
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained(folder / "base")


def base():
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def says(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def lora(**options):
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options
    )


# Several, switched, combined, deleted.
model = get_peft_model(base(), lora(r=4), adapter_name="one")
model.add_adapter("two", lora(r=8, lora_alpha=4))
one = says(model)
model.set_adapter("two")
two = says(model)
assert not torch.allclose(one, two) and model.active_adapter == "two"
with model.disable_adapter():
    none = says(model)
torch.testing.assert_close(none, says(base()))
model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", combination_type="cat")
model.set_adapter("both")
both = says(model)
assert not torch.allclose(both, one) and not torch.allclose(both, two)
model.delete_adapter("both")
assert set(model.peft_config) == {"one", "two"}
model.set_adapter("one")

# Saved and loaded.
model.save_pretrained(folder / "adapters", selected_adapters=["one", "two"])
assert (folder / "adapters" / "one" / "adapter_config.json").is_file()
again = PeftModel.from_pretrained(base(), folder / "adapters" / "one", adapter_name="one")
again.load_adapter(str(folder / "adapters" / "two"), adapter_name="two")
torch.testing.assert_close(says(again), one)
again.set_adapter("two")
torch.testing.assert_close(says(again), two)
found = PeftConfig.from_pretrained(folder / "adapters" / "two")
assert found.r == 8 and found.peft_type == "LORA" and found.base_model_name_or_path
auto = AutoPeftModelForCausalLM.from_pretrained(folder / "adapters" / "one")
torch.testing.assert_close(says(auto), one)
hotswap_adapter(auto, str(folder / "adapters" / "two"), adapter_name="default")
torch.testing.assert_close(says(auto), two)

# Rows with adapters of their own.
again.eval()
with torch.no_grad():
    rows = again(input_ids=ids.repeat(3, 1), adapter_names=["one", "__base__", "two"]).logits
torch.testing.assert_close(rows, torch.cat([one, none, two]), atol=1e-5, rtol=1e-4)

# Merged.
merged = again.merge_and_unload()
torch.testing.assert_close(says(merged), two, atol=1e-4, rtol=1e-4)

# Tensors by name.
state = get_peft_model_state_dict(model, adapter_name="one")
assert all("one" not in key for key in state)
fresh = get_peft_model(base(), lora(r=4))
set_peft_model_state_dict(fresh, state)
torch.testing.assert_close(says(fresh), one)

# Injected in place, and what is known of it.
plain = inject_adapter_in_model(lora(r=4), base())
assert not torch.allclose(says(plain), none)
status = get_model_status(model)
assert set(status.available_adapters) == {"one", "two"} and status.num_adapter_layers == 4
assert len(get_layer_status(model)) == 4
trained, total = model.get_nb_trainable_parameters()
assert 0 < trained < total

# Other methods: a step, and the file.
for options in (
    IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init=PromptTuningInit.RANDOM),
    PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
):
    other = get_peft_model(base(), options)
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = other(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0], type(options).__name__
    where = folder / type(options).__name__
    other.save_pretrained(where)
    torch.testing.assert_close(says(PeftModel.from_pretrained(base(), where)), says(other), atol=1e-5, rtol=1e-4)
    made = other.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert made.shape[0] == 1
