"""Checks of saved adapters (doctor, verify); may import model and everything below it."""
