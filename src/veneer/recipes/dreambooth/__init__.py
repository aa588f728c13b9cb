"""`veneer dreambooth`: teach a Stable Diffusion model a subject from a few images (Ruiz et al. 2022, arxiv.org/abs/2208.12242)."""
