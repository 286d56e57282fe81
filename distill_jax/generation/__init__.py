"""Text generation: decoding with a KV cache on local devices, and requests to servers."""
