"""From text, images and sounds to arrays: sources, tokenizers, chat templates, packing."""
