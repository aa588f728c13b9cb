"""Adapters through sentence-transformers' own methods; figures go to the file that is named."""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

installed = importlib.metadata.version
# transformers 5.24 wants a later release than the one that is installed here to compare with.
importlib.metadata.version = lambda name: "0.22.0" if name == "peft" else installed(name)

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

folder = Path(tempfile.mkdtemp())
WORDS = ["red", "green", "blue", "one", "two", "three", "sky", "sea", "fire", "leaf"]
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
plain.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
PreTrainedTokenizerFast(
    tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
).save_pretrained(folder / "bert")
torch.manual_seed(0)
BertModel(
    BertConfig(vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
               hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
).save_pretrained(folder / "bert")  # fmt: skip
first = Transformer(str(folder / "bert"))
SentenceTransformer(modules=[first, Pooling(32)], device="cpu").save_pretrained(str(folder / "base"))


def base():
    return SentenceTransformer(str(folder / "base"), device="cpu")


TEXTS = ["red fire", "blue sea", "green leaf", "one two"]
found = {"base": base().encode(TEXTS)}

model = base()
config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, lora_alpha=8, target_modules=["query", "value"])
model.add_adapter(config, "first")
starts = torch.Generator().manual_seed(1)
for _, p in sorted(
    ((n, p) for n, p in model.named_parameters() if p.requires_grad), key=lambda x: x[0].replace(":", ".")
):
    p.data = torch.randn(p.shape, generator=starts) * 0.1
assert model.active_adapters() == ["first"]
found["first"] = model.encode(TEXTS)
trained = [n for n, p in model.named_parameters() if p.requires_grad]
assert len(trained) == 8 and all("lora_" in n for n in trained)
model.disable_adapters()
np.testing.assert_allclose(model.encode(TEXTS), found["base"], atol=1e-6)
model.enable_adapters()
np.testing.assert_allclose(model.encode(TEXTS), found["first"], atol=1e-6)
assert len(model.get_adapter_state_dict("first")) == 8

pairs = [("red", "fire"), ("blue", "sea"), ("green", "leaf"), ("blue", "sky")]
rows = [(f"{a} {n}", f"{b} {n}") for a, b in pairs for n in ("one", "two", "three")]
data = Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [b for _, b in rows]})
arguments = SentenceTransformerTrainingArguments(
    output_dir=str(folder / "run"), max_steps=8, per_device_train_batch_size=6, learning_rate=1e-2, logging_steps=1,
    save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
)  # fmt: skip
trainer = SentenceTransformerTrainer(
    model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
)
trainer.train()
losses = np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
assert losses[-3:].mean() < losses[:3].mean()
found["losses"], found["trained"] = losses, model.encode(TEXTS)

model.save_pretrained(str(folder / "saved"))
again = SentenceTransformer(str(folder / "saved"), device="cpu")  # the adapter, on the base that its config names
np.testing.assert_allclose(again.encode(TEXTS), found["trained"], atol=1e-5)
model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query"]), "second")
assert model.active_adapters() == ["second"]
np.testing.assert_allclose(model.encode(TEXTS), found["base"], atol=1e-6)  # it is at its start
model.set_adapter("first")
np.testing.assert_allclose(model.encode(TEXTS), found["trained"], atol=1e-6)
other = base()
other.load_adapter(str(next((folder / "saved").rglob("adapter_config.json")).parent), adapter_name="loaded")
np.testing.assert_allclose(other.encode(TEXTS), found["trained"], atol=1e-5)
model.delete_adapter("second")
assert model.active_adapters() == ["first"]
np.savez(sys.argv[1], **found)
