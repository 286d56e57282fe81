"""Teachers on vLLM or SGLang servers that score given tokens."""
