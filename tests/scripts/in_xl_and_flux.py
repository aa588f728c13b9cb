"""LoRA through diffusers' own methods, on Stable Diffusion XL and on Flux; the images go to the file that is named."""

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
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import diffusion

folder = Path(tempfile.mkdtemp())
ATTENTION, TEXT = ["to_q", "to_k", "to_v", "to_out.0"], ["q_proj", "v_proj", "out_proj"]


def scrambled(module, r, alpha, targets):
    """A LoRA with values of its own; its tensors as diffusers saves them."""
    module.add_adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets))
    drawn = torch.Generator().manual_seed(r)
    for _, p in sorted(module.named_parameters(), key=lambda x: x[0].replace(":", ".")):
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=drawn) * 0.5
    return get_peft_model_state_dict(module)


def check(kind, pipe, draw, save, parts):
    """The same steps on a pipeline of either kind."""
    pipe.set_progress_bar_config(disable=True)
    save("x", 4, 8)
    save("y", 2, 2)
    found = {"base": draw()}
    pipe.load_lora_weights(str(folder / f"{kind}-x"), adapter_name="x")
    found["one"] = draw()
    pipe.load_lora_weights(load_file(folder / f"{kind}-y" / "pytorch_lora_weights.safetensors"), adapter_name="y")
    pipe.set_adapters(["x", "y"], [0.7, 0.3])
    found["weighted"] = draw()
    assert pipe.get_active_adapters() == ["x", "y"]
    assert pipe.get_list_adapters() == {part: ["x", "y"] for part in parts}
    pipe.set_adapters("y")
    found["other"] = draw()
    pipe.disable_lora()
    assert np.array_equal(draw(), found["base"])
    pipe.enable_lora()
    assert np.array_equal(draw(), found["other"])
    pipe.fuse_lora(lora_scale=0.8, adapter_names=["x", "y"], safe_fusing=True)
    found["both fused"] = draw()
    pipe.unfuse_lora()
    found["unfused"] = draw()  # diffusers scales the active ones by what they were fused with
    pipe.delete_adapters("x")
    assert pipe.get_list_adapters() == {part: ["y"] for part in parts}
    found["left"] = draw()
    pipe.unload_lora_weights()
    assert np.array_equal(draw(), found["base"])
    if kind == "flux":  # as they are, one in the place of another of a smaller rank
        pipe.enable_lora_hotswap(target_rank=4)
        pipe.load_lora_weights(str(folder / f"{kind}-y"), adapter_name="slot")
        found["in a slot"] = draw()
        pipe.load_lora_weights(str(folder / f"{kind}-x"), adapter_name="slot", hotswap=True)
        found["swapped in"] = draw()
    return {f"{kind}: {name}": image for name, image in found.items()}


xl = diffusion.xl(folder)


def draw_xl(**options):
    made = xl("a photo of sks dog", num_inference_steps=2, height=32, width=32,
              generator=torch.Generator().manual_seed(0), **options)  # fmt: skip
    return np.asarray(made.images[0]).astype(int)


def save_xl(name, r, alpha):
    made = diffusion.xl(folder)
    StableDiffusionXLPipeline.save_lora_weights(
        folder / f"xl-{name}",
        unet_lora_layers=scrambled(made.unet, r, alpha, ATTENTION),
        text_encoder_lora_layers=scrambled(made.text_encoder, r, alpha, TEXT),
        text_encoder_2_lora_layers=scrambled(made.text_encoder_2, r, alpha, TEXT),
        unet_lora_adapter_metadata={"r": r, "lora_alpha": alpha, "target_modules": ATTENTION},
        text_encoder_lora_adapter_metadata={"r": r, "lora_alpha": alpha, "target_modules": TEXT},
        text_encoder_2_lora_adapter_metadata={"r": r, "lora_alpha": alpha, "target_modules": TEXT},
    )


found = check("xl", xl, draw_xl, save_xl, ["text_encoder", "text_encoder_2", "unet"])

flux = diffusion.flux(folder)
words = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
pooled = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))


def draw_flux(**options):
    made = flux(prompt_embeds=words, pooled_prompt_embeds=pooled, num_inference_steps=2, height=32, width=32,
                generator=torch.Generator().manual_seed(0), **options)  # fmt: skip
    return np.asarray(made.images[0]).astype(int)


def save_flux(name, r, alpha):
    made = diffusion.flux(folder)
    FluxPipeline.save_lora_weights(
        folder / f"flux-{name}", transformer_lora_layers=scrambled(made.transformer, r, alpha, ATTENTION),
        transformer_lora_adapter_metadata={"r": r, "lora_alpha": alpha, "target_modules": ATTENTION},
    )  # fmt: skip


found |= check("flux", flux, draw_flux, save_flux, ["transformer"])

# A file as kohya's trainer names things: its keys are read by diffusers, which hands them to the adapters.
down = {"lora_unet_double_blocks_0_img_attn_proj": (32, 32), "lora_unet_single_blocks_0_linear2": (160, 32)}
drawn = torch.Generator().manual_seed(9)
state = {}
for layer, (inputs, outputs) in down.items():
    state[f"{layer}.lora_down.weight"] = torch.randn(4, inputs, generator=drawn) * 0.5
    state[f"{layer}.lora_up.weight"] = torch.randn(outputs, 4, generator=drawn) * 0.5
    state[f"{layer}.alpha"] = torch.tensor(2.0)
save_file(state, folder / "kohya.safetensors")
fresh = diffusion.flux(folder)
fresh.set_progress_bar_config(disable=True)
flux = fresh
fresh.load_lora_weights(str(folder), weight_name="kohya.safetensors", adapter_name="kohya")
found["flux: kohya"] = draw_flux()
found["flux: half of kohya"] = draw_flux(joint_attention_kwargs={"scale": 0.5})
np.savez(sys.argv[1], **found)
