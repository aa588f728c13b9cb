"""Watching and preparing training; may import lifecycle and everything below it."""
