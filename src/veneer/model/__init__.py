"""Public API: PeftModel, auto classes, status; may import export, serving, files, training and everything below them."""
