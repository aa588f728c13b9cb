"""Slots and hot swapping; may import lifecycle and everything below it."""
