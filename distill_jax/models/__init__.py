"""One model family a file; the folder is the registry.

A family is a module with `Config` (a frozen dataclass with `from_hf`, `to_hf`), `TINY`,
`CONFIGS` (published shapes by name) and `Model(config, key)`.
"""
