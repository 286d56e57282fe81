"""From text to batches: sources, tokenizers, packing, the loader."""
