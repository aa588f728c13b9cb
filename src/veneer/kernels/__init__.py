"""Faster ways to do what an operator's own `apply` and `dense` do; each may decline."""
