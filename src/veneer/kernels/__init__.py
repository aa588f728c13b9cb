"""Fused paths for (layer kind, operator) pairs; each may decline, and must match the operator's own `apply` in outputs
and gradients. May import injection and everything below it.
"""
