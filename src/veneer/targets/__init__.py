"""Which modules a config means: selection, defaults, patterns, blocks; may import backends, io and below."""
