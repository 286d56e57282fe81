"""Import and export of models: Hugging Face folders (safetensors) and GGUF files."""
