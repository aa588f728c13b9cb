"""Locating, reading and writing files safely; may import backends, distributed and algebra."""
