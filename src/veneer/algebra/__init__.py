"""Operators, the recursion that evaluates them, and starting values; imports torch only, and nothing of the package."""
