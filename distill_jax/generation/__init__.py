"""Decoding with a cache: what `generate` is made of."""
