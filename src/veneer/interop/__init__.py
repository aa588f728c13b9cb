"""Callbacks and shims for other frameworks, one framework a file; may import training, files and everything below them."""
