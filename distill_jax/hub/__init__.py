"""Models in and out: safetensors folders and GGUF files, by the parameters' own declarations."""
