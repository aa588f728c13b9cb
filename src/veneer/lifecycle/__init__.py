"""Attaching, merging, combining and detaching adapters; may import kernels, prompts and everything below them."""
