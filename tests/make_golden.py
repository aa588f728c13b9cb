"""Writes tests/golden: adapters as peft wrote them, with what the model said. `python tests/make_golden.py`."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file

from small import IDS, llama, scramble

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "lora": peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["v_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["k_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "vera": peft.VeraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    "tokens": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5]),
    "copy": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "ln_tuning": peft.LNTuningConfig(),
    "adaption_prompt": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
}


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, config in CASES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(llama(1), config)
            scramble(model)
            model.save_pretrained(str(GOLDEN / name))
        (GOLDEN / name / "README.md").unlink()
        with torch.no_grad():
            save_file({"logits": model.eval()(IDS).logits}, GOLDEN / name / "expected.safetensors")
    versions = {"peft": peft.__version__, "torch": torch.__version__}
    (GOLDEN / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
