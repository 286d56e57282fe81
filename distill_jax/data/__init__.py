"""Text, images and sound as arrays: document sources, tokenizers, chat templates and packing."""
