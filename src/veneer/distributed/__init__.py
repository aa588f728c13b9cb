"""Sharding, offloading and tensor parallelism of other frameworks; imports torch only, and nothing of the package."""
