"""Makes speech for the recipe beside: sentences with product names that nobody has heard of, in eight voices.

python examples/whisper_int8/make_speech.py runs/speech
writes runs/speech/train.jsonl and test.jsonl with WAV files of 16 kHz beside them. The sentences of the test are not
among those to train on, and neither are their voices' speeds; the names are the same. It takes the command espeak-ng
where there is one, else the library of the package espeakng-loader.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import shutil
import subprocess
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.signal import resample_poly

RATE = 16000
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-us+f3", "en-gb+f2", "en-gb-x-gbcwmd", "en-029")
NAMES = ("Velodrix", "Quantessa", "Mobrellium", "Zyphora", "Tarkonexa", "Brimwelda", "Oxalune", "Fendrigo")
TRAIN = (
    "Please open the {} dashboard.",
    "I ordered a {} last week.",
    "Where can I buy {}?",
    "The new {} is faster than the old one.",
    "My {} stopped working this morning.",
    "We are moving our data to {}.",
    "Can you explain how {} works?",
    "She told me that {} was too expensive.",
    "Install {} on both computers.",
    "The meeting about {} is on Monday.",
)
TEST = (
    "They said {} will be ready by Friday.",
    "How much does {} cost in Canada?",
    "Turn off {} before you leave the house.",
    "Our team has used {} for three years.",
)


def speak(text: str, voice: str, speed: int, path: Path) -> None:
    """Write what espeak-ng says as a mono WAV file."""
    command = shutil.which("espeak-ng")
    if command:
        subprocess.run([command, "-v", voice, "-s", str(speed), "-w", str(path), text], check=True)
        samples, found = soundfile.read(path, dtype="float32")  # (samples,)
    else:
        samples, found = with_library(text, voice, speed)
    common = gcd(found, RATE)
    soundfile.write(path, resample_poly(samples, RATE // common, found // common), RATE, subtype="PCM_16")


class Voice(ctypes.Structure):
    """espeak_VOICE of speak_lib.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("numbers", ctypes.c_ubyte * 4),  # gender, age, variant, and one of its own
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


def with_library(text: str, voice: str, speed: int) -> tuple[Any, int]:
    """What the library of espeakng-loader says, and its sampling rate."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data, retrieval, rate_parameter, utf8 = espeakng_loader.get_data_path(), 1, 1, 1  # as in speak_lib.h
    rate = library.espeak_Initialize(retrieval, 0, str(Path(data).parent).encode(), 0)
    if rate <= 0:
        rate = library.espeak_Initialize(retrieval, 0, str(data).encode(), 0)
    parts: list[Any] = []

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def take(wave: Any, n: int, _: Any) -> int:
        if wave and n:
            parts.append(np.ctypeslib.as_array(wave, (n,)).copy())
        return 0

    heard = callback(take)  # kept, as the library calls it later
    library.espeak_SetSynthCallback(heard)
    language, _, _ = voice.partition("+")
    if library.espeak_SetVoiceByName(voice.encode()):
        # Some names are those of languages, which this library finds by their properties only.
        wanted = Voice(languages=language.encode())
        if library.espeak_SetVoiceByProperties(ctypes.byref(wanted)):
            raise ValueError(f"voice {voice!r}: espeak-ng has none of this name")
    library.espeak_SetParameter(rate_parameter, speed, 0)
    said = text.encode() + b"\0"
    library.espeak_Synth(said, len(said), 0, 1, 0, utf8, None, None)
    library.espeak_Synchronize()
    return np.concatenate(parts).astype(np.float32) / 32768, rate


def make(folder: Path, names: tuple[str, ...] = NAMES, voices: tuple[str, ...] = VOICES) -> None:
    """Write both parts."""
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    for part, sentences, speeds in (("train", TRAIN, (140, 165, 155)), ("test", TEST, (150, 160))):
        rows = []
        for i, (name, sentence) in enumerate(itertools.product(names, sentences)):
            # Voices and speeds take turns, so that each name is heard in several.
            voice, speed = voices[(i + i // len(sentences)) % len(voices)], speeds[i % len(speeds)]
            text, file = sentence.format(name), f"wav/{part}-{i:03}.wav"
            speak(text, voice, speed, folder / file)
            rows.append({"audio": file, "text": text, "voice": voice})
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
