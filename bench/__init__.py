"""Figures of the project: `python -m bench`. Parity first; no speed is reported on a red check."""
