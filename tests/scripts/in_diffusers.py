"""LoRA through diffusers' own methods; the images go to the file that is named."""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

installed = importlib.metadata.version
# transformers 5.24 wants a later release than the one that is installed here to compare with.
importlib.metadata.version = lambda name: "0.22.0" if name == "peft" else installed(name)
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

import diffusion

folder = Path(tempfile.mkdtemp())
pipe = diffusion.pipeline(folder)
pipe.set_progress_bar_config(disable=True)


def draw(**options):
    made = pipe("a photo of sks dog", num_inference_steps=2, height=32, width=32,
                generator=torch.Generator().manual_seed(0), **options)  # fmt: skip
    return np.asarray(made.images[0]).astype(int)


def save(name, r, alpha):
    """An adapter with values of its own for UNet and text encoder."""
    made = diffusion.pipeline(folder)
    for module, targets in (
        (made.unet, ["to_q", "to_k", "to_v", "to_out.0"]),
        (made.text_encoder, ["q_proj", "v_proj"]),
    ):
        module.add_adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets))
        drawn = torch.Generator().manual_seed(r)
        for _, p in sorted(module.named_parameters(), key=lambda x: x[0].replace(":", ".")):
            if p.requires_grad:
                p.data = torch.randn(p.shape, generator=drawn) * 0.5
    StableDiffusionPipeline.save_lora_weights(
        folder / name,
        unet_lora_layers=get_peft_model_state_dict(made.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(made.text_encoder),
    )


save("x", 4, 8)
save("y", 2, 2)
found = {"base": draw()}
pipe.load_lora_weights(str(folder / "x"), adapter_name="x")
found["one"] = draw()
found["scaled in the call"] = draw(cross_attention_kwargs={"scale": 0.5})
pipe.load_lora_weights(str(folder / "y"), adapter_name="y")
pipe.set_adapters(["x", "y"], [0.7, 0.3])
found["weighted"] = draw()
assert pipe.get_active_adapters() == ["x", "y"]
assert pipe.get_list_adapters() == {"unet": ["x", "y"], "text_encoder": ["x", "y"]}
pipe.set_adapters("y")
found["other"] = draw()
pipe.disable_lora()
assert np.array_equal(draw(), found["base"])
pipe.enable_lora()
assert np.array_equal(draw(), found["other"])
pipe.set_adapters(["x"])
pipe.fuse_lora(lora_scale=0.8, adapter_names=["x"])
found["fused"] = draw()
pipe.unfuse_lora()
found["unfused"] = draw()
pipe.set_adapters(["x"], [-0.5])
found["negative"] = draw()
pipe.set_adapters(["x"], [{"unet": {"down": 0.2, "up": 0.9, "mid": 0.5}, "text_encoder": 0.3}])
found["by block"] = draw()
pipe.delete_adapters("x")
assert pipe.get_list_adapters() == {"unet": ["y"], "text_encoder": ["y"]}
state = load_file(folder / "y" / "pytorch_lora_weights.safetensors")
pipe.unet.load_lora_adapter({k: v * 2 for k, v in state.items()}, prefix="unet", adapter_name="y", hotswap=True)
pipe.set_adapters("y")
found["swapped"] = draw()
pipe.unload_lora_weights()
assert np.array_equal(draw(), found["base"])
np.savez(sys.argv[1], **found)
