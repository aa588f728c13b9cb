"""Speech to text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models import find_model
from ..run import Run
from .base import Row, Task, eval_mode

CTC_MODELS = ("wav2vec2", "wavlm", "hubert", "unispeech", "unispeech-sat", "wav2vec2-bert", "data2vec-audio", "sew", "sew-d",
              "wav2vec2-conformer", "parakeet_ctc", "lasr_ctc", "mctct")  # fmt: skip


class SpeechRecognition(Task):
    """Rows of a sound file and what is said in it, for encoder-decoder models (Whisper) and CTC ones (wav2vec 2.0)."""

    name, auto = "speech-recognition", "AutoModelForSpeechSeq2Seq"
    heads = ("lm_head",)  # of CTC models; Whisper's is tied and is called otherwise
    by_length = False

    def columns(self, run: Run) -> list[tuple[str, ...]]:
        return [(run.audio_column, run.text_column)]

    def auto_class(self, where: str) -> str:
        from transformers import AutoConfig

        return "AutoModelForCTC" if AutoConfig.from_pretrained(where).model_type in CTC_MODELS else self.auto

    def processor_of(self, model: str) -> Any:
        from transformers import AutoProcessor

        where = find_model(model)
        try:
            found = AutoProcessor.from_pretrained(where)
        except (OSError, ValueError) as error:
            raise InputError(f"model {model!r} has no processor that can be loaded: {error}") from error
        if not hasattr(found, "feature_extractor") or not hasattr(found, "tokenizer"):
            raise InputError(f"model {model!r} is not for speech: it has no feature extractor beside its tokenizer")
        return found

    def files(self, run: Run) -> str | None:
        return run.audio_column

    def check(self, run: Run, rows: list[Row], source: str) -> None:
        missing = [n for n in ("soundfile", "scipy", "jiwer") if find_spec(n) is None]
        if missing:
            raise InputError(f"{self.name} needs {', '.join(missing)}; run: pip install 'veneer[media]'")
        for i, row in enumerate(rows, 1):
            read_sound(row[run.audio_column], f"data {source!r}, row {i}", None)
            if not str(row[run.text_column] or "").strip():
                raise InputError(f"data {source!r}, row {i}: nothing stands in {run.text_column!r}")

    def encode(self, run: Run, rows: list[Row], processor: Any, labels: list[str]) -> list[Row]:
        """Sounds are read when a batch is made; texts become ids, without what the model puts first by itself."""
        unknown, made = processor.tokenizer.unk_token_id, []
        for row in rows:
            text = str(row[run.text_column])
            ids = processor.tokenizer(text).input_ids
            if ids and hasattr(
                processor.tokenizer, "set_prefix_tokens"
            ):  # Whisper's begins with what decoding begins with
                ids = ids[1:]
            elif unknown is not None and unknown in ids:
                raise InputError(
                    f"the model's {len(processor.tokenizer)} characters cannot write {text!r}; write texts as its "
                    f"vocabulary does ({''.join(k for k in processor.tokenizer.get_vocab() if len(k) == 1)})"
                )
            made.append({"audio": row[run.audio_column], "labels": ids[: run.max_length]})
        return made

    def collator(self, run: Run, processor: object, model: object) -> Any:
        import torch

        def batch(rows: list[Row]) -> dict[str, Any]:
            made = extract_features(processor, model, [r["audio"] for r in rows])
            length = max(len(r["labels"]) for r in rows)
            padded = [r["labels"] + [-100] * (length - len(r["labels"])) for r in rows]
            return {**made, "labels": torch.tensor(padded)}  # (B, L)

        return batch

    def row(self, run: Run, text: str, context: str | None, labels: list[str]) -> Row:
        read_sound(text, "audio", None)
        return {run.audio_column: text, run.text_column: text}

    def asked(self, run: Run, rows: list[Row], processor: object) -> list[str]:
        return [str(r[run.text_column]) for r in rows]

    def answers(self, run: Run, model: Any, processor: Any, rows: list[Row]) -> list[str]:
        import torch

        said = []
        for at in range(0, len(rows), run.batch_size):
            some = [r[run.audio_column] for r in rows[at : at + run.batch_size]]
            inputs = {k: v.to(model.device) for k, v in extract_features(processor, model, some).items()}
            with eval_mode(model):
                if model.config.is_encoder_decoder:
                    ids = model.generate(**inputs, max_new_tokens=max(run.max_new_tokens, 1), do_sample=False)
                else:
                    ids = model(**inputs).logits.argmax(-1)  # (B, frames)
                    heard = inputs.get("attention_mask")  # (B, samples) or (B, frames of features)
                    if heard is not None and hasattr(model, "_get_feat_extract_output_lengths"):
                        frames = model._get_feat_extract_output_lengths(heard.sum(-1))  # (B,)
                        silent = torch.arange(ids.shape[1], device=ids.device) >= frames.to(ids.device)[:, None]
                        ids = ids.masked_fill(silent, model.config.pad_token_id)  # blank, where there is only padding
            said += [t.strip() for t in processor.batch_decode(ids, skip_special_tokens=True)]
        return said

    def scored(self, run: Run) -> bool:
        return True

    def scores(self, run: Run, rows: list[Row], answers: list[str]) -> dict[str, float]:
        """Word error rate, of words without case and punctuation."""
        import jiwer

        right = [split_words(str(r[run.text_column])) for r in rows]
        return {"eval_word_error_rate": float(jiwer.wer(right, [split_words(a) for a in answers]))}


def split_words(text: str) -> str:
    """A text as its words are counted: small letters, digits and apostrophes."""
    return " ".join("".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split())


def extract_features(processor: Any, model: Any, sounds: list[Any]) -> dict[str, Any]:
    """Inputs of a model for sound files."""
    extractor = processor.feature_extractor
    rate = int(extractor.sampling_rate)
    waves = [read_sound(a, "audio", rate) for a in sounds]
    # Whisper's encoder takes windows of one length; others are padded to the longest, which they must be told of.
    options = {} if model.config.model_type == "whisper" else {"padding": True, "return_attention_mask": True}
    made = extractor(waves, sampling_rate=rate, return_tensors="pt", **options)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}


def read_sound(name: object, where: str, rate: int | None) -> Any:
    """A sound file's samples as float32 (samples,), its channels averaged, resampled to `rate` unless None.

    Resampling is scipy's polyphase one, which filters what the new rate cannot carry.

    Raises:
        InputError: no file, none that soundfile reads, an empty one, or values that are not finite.
    """
    import numpy as np
    import soundfile

    if not isinstance(name, str | Path):
        raise InputError(f"{where}: {str(name)[:60]!r} is no path of a sound file")
    path = Path(name)
    try:
        samples, found = soundfile.read(path, dtype="float32", always_2d=True)  # (samples, channels)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{where}: {str(path)!r} cannot be read as sound: {error}") from error
    if not len(samples):
        raise InputError(f"{where}: {str(path)!r} has no samples")
    if not np.isfinite(samples).all():
        raise InputError(f"{where}: {str(path)!r} has {int((~np.isfinite(samples)).sum())} samples that are not finite")
    mono = samples.mean(1)
    if rate is not None and found != rate:
        from math import gcd

        from scipy.signal import resample_poly

        common = gcd(found, rate)
        mono = resample_poly(mono, rate // common, found // common).astype(np.float32)
    return mono
