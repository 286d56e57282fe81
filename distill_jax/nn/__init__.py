"""Parameters, sharding, layers, attention and the fused head: code that reads no files."""
