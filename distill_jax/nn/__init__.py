"""How arrays are computed: parameters, sharding, layers, attention, the fused head. No files."""
