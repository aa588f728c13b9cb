"""The tasks of `veneer train` on tiny models that are made here, and what they say of input that cannot be used."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    LayoutLMConfig,
    LayoutLMForTokenClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from test_cli import veneer
from veneer.files import ctranslate2
from veneer.recipes.data import read_rows
from veneer.recipes.errors import InputError
from veneer.recipes.models import find_model
from veneer.recipes.tasks.images import to_rgb
from veneer.recipes.tasks.speech import read_sound

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = [
    "--held-out",
    200,
    "--steps",
    120,
    "--batch-size",
    32,
    "--r",
    16,
    "--lora-alpha",
    64,
    "--learning-rate",
    "5e-3",
]
WORDS = [
    "pay",
    "to",
    "the",
    "order",
    "of",
    "total",
    "date",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
    "who",
    "paid",
    "said",
    "ann",
    "bob",
    "cid",
]
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
FEW = ["--eval-every", 0, "--save-every", 0, "--batch-size", 8, "--held-out", 16, "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=64, **special)


def save(folder: Path, model: Any, *others: Any) -> Path:
    for part in (model, *others):
        part.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def run(folder: Path, task: str, model: Path, data: Any, *more: Any, ok: bool = True) -> Any:
    where = ["--task", task, "--model", model, "--data", data, "--out", folder / "run"]
    said = veneer("train", *where, *FEW, "--target-modules", "all-linear", *more, ok=ok)
    if ok:
        return json.loads((folder / "run" / "report.json").read_text())
    assert not (folder / "run" / "adapter_config.json").exists()
    return " ".join(said.output.split())


@pytest.fixture(scope="module")
def vit(tmp_path_factory: Any) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(**TINY, image_size=8, patch_size=2, num_labels=10)
    shape = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    folder: Path = tmp_path_factory.mktemp("vit")
    return save(folder, ViTForImageClassification(config), ViTImageProcessorPil(**shape))


def test_digits(vit: Path, tmp_path: Path) -> None:
    report = run(tmp_path, "image-classification", vit, "digits", *DIGITS)
    before, after = report["measured"]["accuracy"]
    assert before < 0.2 and after > 0.3
    assert all(re.fullmatch(r"\d \(\d+%\)", s["after"]) for s in report["samples"])


def test_a_folder_of_classes_and_images_of_all_modes(vit: Path, tmp_path: Path) -> None:
    rng, modes = np.random.default_rng(0), ("RGB", "L", "RGBA", "P", "CMYK", "I;16")
    for label, light in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(18):
            pixels = rng.integers(light - 20, light + 20, (9, 7), np.uint8)
            mode = modes[i % 6]
            grey = Image.fromarray(pixels.astype(np.uint16) * 257 if mode == "I;16" else pixels)
            name = f"{i}.tif" if mode == "CMYK" else f"{i}.png"
            (grey if mode == "I;16" else grey.convert(mode)).save(tmp_path / "data" / label / name)
    report = run(tmp_path, "image-classification", vit, tmp_path / "data", "--steps", 30)
    assert report["measured"]["accuracy"][1] == 1
    asked = [x for kind in ("dark", "light") for x in ("-p", tmp_path / "data" / kind / "0.png")]
    said = veneer("generate", vit, "--adapter", tmp_path / "run", *asked).output
    assert re.findall(r"(dark|light) \(\d+%\)", said) == ["dark", "light"]
    veneer("merge", vit, tmp_path / "run", tmp_path / "merged")
    assert veneer("generate", tmp_path / "merged", *asked, "--task", "image-classification").output == said
    wrong = veneer("generate", vit, "--adapter", tmp_path / "run", "-p", tmp_path / "none.png", ok=False)
    assert "cannot be read as an image" in wrong.output
    (tmp_path / "run" / "adapter_task.json").unlink()  # as peft would leave it
    named = veneer("generate", vit, "--adapter", tmp_path / "run", *asked, "--task", "image-classification").output
    assert re.findall(r"LABEL_\d", named) == ["LABEL_0", "LABEL_1"]


@pytest.mark.slow
def test_a_head_for_other_classes_is_verified(vit: Path, tmp_path: Path) -> None:
    """In new processes, which find only the base model and the adapter's files."""
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (i, 10, 200 if label == "a" else 20)).save(tmp_path / "data" / label / f"{i}.png")
    run(tmp_path, "image-classification", vit, tmp_path / "data", "--steps", 3, "--held-out", 4)
    assert "passed" in veneer("verify", tmp_path / "run").output


def test_images_in_rgb(tmp_path: Path) -> None:
    grey = np.full((4, 4), 100, np.uint8)
    for image in (Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257), grey):
        assert np.asarray(to_rgb(image, "here"))[0, 0].tolist() == [100, 100, 100]
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert np.asarray(to_rgb(clear, "here"))[0, 0].tolist() == [255, 255, 255]
    with pytest.raises(InputError, match="mode F"):
        to_rgb(Image.fromarray(grey.astype(np.float32)), "here")


def test_wrong_images(vit: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    rows = [{"image": "whole.png", "label": str(i % 2)} for i in range(20)]
    cases = (
        ([*rows, {"image": "cut.png", "label": "0"}], "row 21: '" + str(tmp_path / "cut.png") + "' cannot be read"),
        ([*rows, {"image": "none.png", "label": "0"}], "row 21: 'none.png' cannot be read"),
        ([{"picture": "whole.png", "label": "0"}] * 20, "--image-column"),
        ([{"image": "whole.png", "label": "0"}] * 20, "only the class ['0']"),
    )
    for given, message in cases:
        said = run(tmp_path, "image-classification", vit, write(tmp_path / "rows.jsonl", given), ok=False)
        assert message.replace(" ", "") in said.replace(" ", "")


def documents() -> list[dict[str, Any]]:
    """Numbers on the right of a page are totals, those on the left are not: words alone do not tell."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(64):
        words, boxes, labels = [], [], []
        for y in range(4):
            right = bool(rng.integers(2))
            left = 800 if right else 100
            words.append(str(rng.integers(1, 10)))
            boxes.append([left, 100 * y, left + 50, 100 * y + 40])
            labels.append("TOTAL" if right else "O")
        rows.append({"words": words, "boxes": boxes, "labels": labels})
    return rows


@pytest.fixture(scope="module")
def layout(tokenizer: Any, tmp_path_factory: Any) -> Path:
    torch.manual_seed(0)
    config = LayoutLMConfig(**TINY, vocab_size=len(tokenizer), max_2d_position_embeddings=1024)
    return save(tmp_path_factory.mktemp("layout"), LayoutLMForTokenClassification(config), tokenizer)


def test_layoutlm_learns_from_boxes_what_bert_cannot(layout: Path, tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "pages.jsonl", documents())
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    report = run(tmp_path / "a", "token-classification", layout, data, "--steps", 60)
    assert report["measured"]["accuracy"][1] > 0.95
    assert json.loads((tmp_path / "a/run/adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    assert any("/TOTAL" in s["after"] for s in report["samples"])
    said = veneer(
        "generate", layout, "--adapter", tmp_path / "a/run", "-p", "pay 3 to ann", "--task", "token-classification"
    )
    assert "pay 3 to ann" in said.output
    bert = save(tmp_path / "bert", BertForTokenClassification(BertConfig(**TINY, vocab_size=len(tokenizer))), tokenizer)
    report = run(tmp_path / "b", "token-classification", bert, data, "--steps", 20)
    assert report["measured"]["accuracy"][1] < 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[0, 0, 1001, 5]] * 4}, "row 3: the box [0, 0, 1001, 5] of"),
        ({"boxes": [[50, 0, 20, 5]] * 4}, "numbers from 0 to 1000 that rise"),
        ({"labels": ["O"]}, "row 3: 4 words but 1 labels"),
        ({"words": "one text"}, "must be lists"),
    ],
)
def test_wrong_documents(change: dict[str, Any], message: str, layout: Path, tmp_path: Path) -> None:
    rows = documents()
    if "words" in change:
        rows = [{**r, **change} for r in rows]
        message = "row 1: 'words' and 'labels' " + message
    else:
        rows[2] = {**rows[2], **change}
    said = run(tmp_path, "token-classification", layout, write(tmp_path / "pages.jsonl", rows), ok=False)
    assert message in said


def test_question_answering(tokenizer: Any, tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for _ in range(96):
        who, number = str(rng.choice(["ann", "bob", "cid"])), str(rng.integers(1, 10))
        context = f"date {rng.integers(1, 10)} {who} paid the total of {number}"
        rows.append({"context": context, "question": "who paid", "answer": who})
    data = write(tmp_path / "answers.jsonl", rows)
    torch.manual_seed(0)
    bert = save(tmp_path / "bert", BertForQuestionAnswering(BertConfig(**TINY, vocab_size=len(tokenizer))), tokenizer)
    report = run(tmp_path, "question-answering", bert, data, "--steps", 40)
    assert report["measured"]["exact_match"][0] < 0.5 and report["measured"]["exact_match"][1] == 1
    assert report["measured"]["f1"][1] == 1 and report["loss_after"] < report["loss_before"]
    assert {s["prompt"] for s in report["samples"]} == {"who paid"}
    ask = ["generate", bert, "--adapter", tmp_path / "run", "-p", "who paid"]
    said = veneer(*ask, "--context", "date 3 cid paid the total of 4")
    assert said.output.split() == ["who", "paid", "cid"]
    assert "--context" in veneer(*ask, ok=False).output
    assert "draws nothing" in veneer(*ask, "--context", "ann paid", "--temperature", 1, ok=False).output


def test_wrong_answers(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"context": "ann paid", "question": "who paid", "answer": "ann"}] * 40
    bert = save(tmp_path / "bert", BertForQuestionAnswering(BertConfig(**TINY, vocab_size=len(tokenizer))), tokenizer)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"answer": "dan"}, "row 5: the answer 'dan' does not stand in its 'context'"),
        ({"answer_start": 3}, "does not stand in its 'context' at character 3"),
    )
    for change, message in wrong:
        given = [{**r, **change} if i == 4 or "answer_start" in change else r for i, r in enumerate(rows)]
        data = write(tmp_path / "answers.jsonl", given)
        assert message in run(tmp_path, "question-answering", bert, data, ok=False)
    data = write(tmp_path / "answers.jsonl", [{"context": "ann paid", "question": "who paid"}] * 20)
    assert "--answer-column" in run(tmp_path, "question-answering", bert, data, ok=False)


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("wav2vec2")
    letters = {c: i for i, c in enumerate(["[PAD]", "[UNK]", "|", "L", "O", "W", "H", "I"])}
    (folder / "vocab.json").write_text(json.dumps(letters))
    tokenizer = Wav2Vec2CTCTokenizer(folder / "vocab.json", pad_token="[PAD]", unk_token="[UNK]")
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=16000, do_normalize=True, return_attention_mask=True)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **TINY, vocab_size=len(letters), conv_dim=(32, 32), conv_stride=(10, 8), conv_kernel=(10, 8),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, pad_token_id=0, ctc_zero_infinity=True,
        ctc_loss_reduction="mean", apply_spec_augment=False, num_feat_extract_layers=2, feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )  # fmt: skip
    return save(folder, Wav2Vec2ForCTC(config), Wav2Vec2Processor(extractor, tokenizer))


def tones(folder: Path) -> list[dict[str, Any]]:
    """A low tone says O and a high one I, with silence between, at several rates, in one channel or two."""
    rows, rng = [], np.random.default_rng(0)
    for i in range(96):
        rate, high = (16000, 22050, 8000)[i % 3], rng.integers(2, size=2)
        t = np.arange(rate // 20) / rate
        parts = [0.3 * np.sin(2 * np.pi * (2500 if h else 300) * t) for h in high]
        wave = np.concatenate([parts[0], 0 * t, parts[1]])
        soundfile.write(folder / f"{i}.wav", np.stack([wave, wave], 1) if i % 4 == 0 else wave, rate)
        rows.append({"audio": f"{i}.wav", "text": " ".join("I" if h else "O" for h in high)})
    return rows


def test_ctc(wav2vec2: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "tones.jsonl", tones(tmp_path))
    more = ["--steps", 700, "--r", 16, "--lora-alpha", 32, "--warmup", 50, "--scheduler", "cosine", "--samples", 16]
    more += ["--modules-to-save", "[lm_head,feature_projection,layer_norm]"]
    report = run(tmp_path, "speech-recognition", wav2vec2, data, *more)
    before, after = report["measured"]["word_error_rate"]
    assert report["loss_after"] < 0.1 * report["loss_before"]
    assert before > 0.5 and after < 0.1, report["samples"]  # sounds shorter than others of their batch say no more
    assert {s["prompt"] for s in report["samples"]} <= {"I I", "I O", "O I", "O O"}
    one = tmp_path / "0.wav"
    said = veneer("generate", wav2vec2, "--adapter", tmp_path / "run", "-p", one).output
    assert said.split()[-2:] == json.loads(data.read_text().splitlines()[0])["text"].split()
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any("lm_head" in k for k in saved) and any("lora_A" in k for k in saved)


def test_wrong_sound(wav2vec2: Path, tmp_path: Path) -> None:
    rows = tones(tmp_path)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    wrong = (("empty.wav", "has no samples"), ("nan.wav", "has 100 samples that are not finite"),
             ("text.wav", "cannot be read as sound"), ("gone.wav", "cannot be read as sound"))  # fmt: skip
    for name, message in wrong:
        data = write(tmp_path / "tones.jsonl", [*rows, {"audio": name, "text": "I"}])
        said = run(tmp_path, "speech-recognition", wav2vec2, data, ok=False)
        assert message in said and name in said and "row 97" in said
    data = write(tmp_path / "tones.jsonl", [*rows, {"audio": "1.wav", "text": "lower case"}])
    assert "cannot write 'lower case'" in run(tmp_path, "speech-recognition", wav2vec2, data, ok=False)


def test_sound_is_resampled_and_mixed(tmp_path: Path) -> None:
    t = np.arange(44100) / 44100
    left, right = 0.5 * np.sin(2 * np.pi * 440 * t), 0.1 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 44100, subtype="FLOAT")
    wave = read_sound(str(tmp_path / "a.wav"), "here", 16000)  # (16000,)
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert wave.shape == (16000,) and wave.dtype == np.float32
    assert np.abs(wave - expected)[200:-200].max() < 2e-3


def test_labelled_tweets_by_generation(tokenizer: Any, tmp_path: Path) -> None:
    """Of the complaints' shape, on a tiny model: what is generated is compared with the held-out labels."""
    rows = [{"prompt": f"order {a} {b}", "completion": f"total {'paid' if a == b else 'date'}"}
            for a in WORDS[7:16] for b in WORDS[7:16] if a == b or (int(a) + int(b)) % 3 == 0]  # fmt: skip
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                      eos_token_id=3, pad_token_id=0, decoder_start_token_id=0)  # fmt: skip
    t5 = save(tmp_path / "t5", T5ForConditionalGeneration(config), tokenizer)
    data = write(tmp_path / "tweets.jsonl", rows)
    more = ["--evaluate", "generate", "--steps", 40, "--held-out", 8, "--max-new-tokens", 5]
    report = run(tmp_path, "seq2seq-lm", t5, data, *more)
    before, after = report["measured"]["exact_match"]
    assert before == 0 and after > 0.5
    assert len(report["samples"]) == 3
    plain = write(tmp_path / "plain.jsonl", [{"text": "pay"}] * 20)
    (tmp_path / "x").mkdir()
    assert "evaluate='generate' compares" in run(tmp_path / "x", "causal-lm", t5, plain, *more, ok=False)


def test_ctranslate2_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes((3).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="version 3"):
        ctranslate2.read(tmp_path / "old.bin")
    (tmp_path / "cut.bin").write_bytes((6).to_bytes(4, "little") + b"\x02\0a\0" + b"\0" * 4 + b"\x05\0\0\0")
    with pytest.raises(ValueError, match="ends early"):
        ctranslate2.read(tmp_path / "cut.bin")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: Any) -> Path:
    sys.path.insert(0, str(EXAMPLES / "whisper_int8"))
    try:
        from make_speech import make
    finally:
        sys.path.pop(0)
    folder: Path = tmp_path_factory.mktemp("speech")
    make(folder, ("Velodrix", "Oxalune"), ("en-us", "en-gb"))
    return folder


@pytest.mark.slow
def test_int8_whisper_learns_names(speech: Path, tmp_path: Path) -> None:
    find_model("whisper-tiny.en")
    recipe = EXAMPLES / "whisper_int8" / "recipe.yaml"
    data = ["--data", speech / "train.jsonl", "--eval-data", speech / "test.jsonl", "--out", tmp_path / "run"]
    veneer("train", recipe, *data, "--steps", 15, "--batch-size", 4, "--eval-every", 0)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    before, after = report["measured"]["word_error_rate"]
    assert after < before / 2


def test_fashion_mnist_says_where_it_comes_from(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        read_rows("fashion-mnist")
