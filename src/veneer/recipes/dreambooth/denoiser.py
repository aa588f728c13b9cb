"""The denoising loss of a Stable Diffusion model with adapters, as one module that Trainer can train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def set_attention(kind: str, *modules: Any) -> None:
    """Let diffusers' modules compute attention by PyTorch's fused function ("sdpa"), or form all scores ("eager")."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    for module in modules:
        module.set_attn_processor(AttnProcessor() if kind == "eager" else AttnProcessor2_0())


class Denoiser(nn.Module):
    """Images and their prompts to the loss.

    Args:
        unet, text_encoder, vae, scheduler: of the pipeline; the scheduler adds noise as the model was trained with.
        prior_weight: of the loss on images of the class.
        train_text: whether gradients reach the text encoder.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        prior_weight: float,
        train_text: bool,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.vae = unet, text_encoder, vae
        self.noise, self.prior_weight, self.train_text = scheduler, prior_weight, train_text

    def forward(self, pixels: Tensor, input_ids: Tensor, prior: bool = False) -> dict[str, Tensor]:
        """The loss of Ho et al. 2020, eq. 14 (arxiv.org/abs/2006.11239), for noise or velocity, whichever is predicted.

        Args:
            pixels: (B, 3, side, side) in [-1, 1]; with `prior` the second half shows the class.
            input_ids: (B, tokens).
            prior: add the class's loss, weighted.
        """
        vae: Any = self.vae
        with torch.no_grad():
            seen = vae.encode(pixels.to(vae.dtype)).latent_dist.sample()  # (B, 4, side / 8, side / 8)
            latents = (seen * vae.config.scaling_factor).to(pixels.dtype)
        noise = torch.randn_like(latents)
        steps = torch.randint(self.noise.config.num_train_timesteps, (len(latents),), device=latents.device)  # (B,)
        noisy = self.noise.add_noise(latents, noise, steps)
        with torch.set_grad_enabled(self.train_text and torch.is_grad_enabled()):
            words = self.text_encoder(input_ids)[0]  # (B, tokens, width)
        unet: Any = self.unet
        said = unet(noisy.to(unet.dtype), steps, words.to(unet.dtype)).sample.float()
        velocity = self.noise.config.prediction_type == "v_prediction"
        wanted = (self.noise.get_velocity(latents, noise, steps) if velocity else noise).float()
        if not prior:
            return {"loss": F.mse_loss(said, wanted)}
        (own, others), (own_wanted, others_wanted) = said.chunk(2), wanted.chunk(2)
        return {"loss": F.mse_loss(own, own_wanted) + self.prior_weight * F.mse_loss(others, others_wanted)}
