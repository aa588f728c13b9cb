"""Adapters as other artefacts (LoRA, dense weights); may import files, training, lifecycle and everything below them."""
