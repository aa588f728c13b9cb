"""Each documented method and variant: trained some steps, saved, loaded, merged; figures go to the file that is named."""

import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

folder = Path(tempfile.mkdtemp())
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ids = (torch.arange(24).reshape(2, 12) * 7 + 3) % 60 + 3
CAUSAL = {"task_type": TaskType.CAUSAL_LM}
QV = ["q_proj", "v_proj"]


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                 decoder_start_token_id=0, pad_token_id=0)
    )  # fmt: skip


def bert(head):
    def make():
        torch.manual_seed(0)
        return head(BertConfig(**SIZES, **DRY, num_labels=3 if head is not BertForQuestionAnswering else 2))

    return make


def vit():
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, **DRY, image_size=8, patch_size=4, num_labels=3))


TEXT = {"input_ids": ids, "labels": ids}
# A virtual token before the first does not count as its prediction in Veneer, as it does in peft.
PROMPTED = {"input_ids": ids, "labels": torch.where(torch.arange(12) > 0, ids, -100)}
CLASSES = {"input_ids": ids, "labels": torch.tensor([0, 2])}
SPANS = {"input_ids": ids, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
PICTURES = {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8).sin(), "labels": torch.tensor([0, 1])}

# name -> model, config, inputs, whether it merges
CASES = {
    "lora": (llama, LoraConfig(**CAUSAL, r=4, lora_alpha=8, target_modules=QV), TEXT, True),
    "default targets": (llama, LoraConfig(**CAUSAL, r=4), TEXT, True),
    "all linear": (llama, LoraConfig(**CAUSAL, r=4, target_modules="all-linear"), TEXT, True),
    "rslora": (llama, LoraConfig(**CAUSAL, r=4, target_modules=QV, use_rslora=True), TEXT, True),
    "dora": (llama, LoraConfig(**CAUSAL, r=4, target_modules=QV, use_dora=True), TEXT, True),
    "patterns": (
        llama,
        LoraConfig(**CAUSAL, r=4, target_modules=r".*\.(q|v)_proj", rank_pattern={"layers.1.self_attn.q_proj": 2},
                   alpha_pattern={"v_proj": 3}), TEXT, True,
    ),
    "one layer": (llama, LoraConfig(**CAUSAL, r=4, target_modules=QV, layers_to_transform=[1]), TEXT, True),
    "excluded": (
        llama,
        LoraConfig(**CAUSAL, r=4, target_modules="all-linear", exclude_modules=["down_proj"]), TEXT, True,
    ),
    "bias": (t5, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=4, bias="all", target_modules=["q", "v"]), TEXT, True),
    "bias of bert": (
        bert(BertForSequenceClassification),
        LoraConfig(task_type=TaskType.SEQ_CLS, r=4, bias="lora_only", target_modules=["query"]), CLASSES, True,
    ),
    "embedding": (llama, LoraConfig(**CAUSAL, r=4, target_modules=["embed_tokens", "q_proj"]), TEXT, True),
    "head saved": (llama, LoraConfig(**CAUSAL, r=4, target_modules=QV, modules_to_save=["lm_head"]), TEXT, True),
    "tokens too": (llama, LoraConfig(**CAUSAL, r=4, target_modules=QV, trainable_token_indices=[3, 5]), TEXT, True),
    "convolution": (vit, LoraConfig(r=4, target_modules=["projection", "classifier"]), PICTURES, True),
    "experts": (
        mixtral,
        LoraConfig(**CAUSAL, r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]), TEXT, True,
    ),
    "token classes": (
        bert(BertForTokenClassification), LoraConfig(task_type=TaskType.TOKEN_CLS, r=4),
        {"input_ids": ids, "labels": ids % 3}, True,
    ),
    "questions": (bert(BertForQuestionAnswering), LoraConfig(task_type=TaskType.QUESTION_ANS, r=4), SPANS, True),
    "ia3": (llama, IA3Config(**CAUSAL), TEXT, True),
    "loha": (llama, LoHaConfig(**CAUSAL, r=4, target_modules=QV), TEXT, True),
    "oft": (llama, OFTConfig(**CAUSAL, oft_block_size=8, target_modules=QV), TEXT, True),
    "vera": (llama, VeraConfig(**CAUSAL, r=8, target_modules=QV), TEXT, True),
    "norms": (llama, LNTuningConfig(**CAUSAL), TEXT, True),
    "tokens": (llama, TrainableTokensConfig(**CAUSAL, token_indices=[3, 5, 9], target_modules=["embed_tokens"]), TEXT, True),
    "llama adapter": (llama, AdaptionPromptConfig(**CAUSAL, adapter_len=4, adapter_layers=2), TEXT, False),
    "prompt tuning": (llama, PromptTuningConfig(**CAUSAL, num_virtual_tokens=4), PROMPTED, False),
    "prefix tuning": (llama, PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4), TEXT, False),
    "p-tuning": (llama, PromptEncoderConfig(**CAUSAL, num_virtual_tokens=4, encoder_hidden_size=16), TEXT, False),
    "cpt": (
        llama,
        CPTConfig(**CAUSAL, cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]),
        TEXT | {"input_type_mask": torch.ones_like(ids)}, False,
    ),
    "multitask": (
        t5,
        MultitaskPromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=4, num_tasks=2),
        TEXT | {"task_ids": torch.tensor([0, 1])}, False,
    ),
}  # fmt: skip


RANDOM = (
    "lora_A",
    "lora_embedding_A",
    "lora_embedding_B",
    "hada_w",
    "prompt_embeddings",
    "prefix_task_cols",
    "prefix_task_rows",
)


def draw(model):
    """Values that are the same in whatever library, by their key in the file: drawn, or near the start that is fixed."""
    state, drawn = get_peft_model_state_dict(model), {}
    for key in sorted(state):
        value = state[key]
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        moved = torch.randn(value.shape, generator=generator) * 0.05
        random = any(part in key for part in RANDOM)
        moved *= "base_layer" not in key  # where the base's own embeddings are in the file
        drawn[key] = moved if random else value + moved if value.is_floating_point() else value
    return drawn


def logits(out):
    return (out.start_logits if hasattr(out, "start_logits") else out.logits).float()


LEARNED = ("p-tuning", "cpt")  # what their file holds cannot be put back into the network that computed it

found = {}
for name, (make, config, inputs, merges) in CASES.items():
    torch.manual_seed(1)
    model = get_peft_model(make(), config)
    learned = name in LEARNED
    if not learned:
        set_peft_model_state_dict(model, draw(model))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (name, losses)
    model.eval()
    with torch.no_grad():
        after = logits(model(**inputs))
    model.save_pretrained(folder / name)
    again = PeftModel.from_pretrained(make(), folder / name).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(again(**inputs)), after, atol=1e-5, rtol=1e-4, msg=name)
        with again.disable_adapter():
            base_inputs = {k: v for k, v in inputs.items() if k not in ("task_ids", "input_type_mask")}
            plain = logits(make().eval()(**base_inputs))
            if merges and name != "embedding":  # whose file also brings the base's embeddings
                torch.testing.assert_close(logits(again(**base_inputs)), plain, atol=1e-5, rtol=1e-4, msg=name)
        if merges:
            merged = again.merge_and_unload()
            torch.testing.assert_close(logits(merged(**base_inputs)), after, atol=1e-4, rtol=1e-3, msg=name)
    if not learned:
        found[f"{name}: losses"] = np.array(losses)
    found[f"{name}: trained"] = np.array([sum(p.numel() for p in trained)])
np.savez(sys.argv[1], **found)
