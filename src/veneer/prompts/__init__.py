"""Virtual tokens: stacks, masks, caches and their forward; may import injection and everything below it."""
