"""Adapter files, state dicts, certificates and other layouts; may import lifecycle and everything below it."""
