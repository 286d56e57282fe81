"""One model family a file; the folder is the registry.

A family is a module with `Config` (a frozen dataclass with `from_hf`, `to_hf`), `TINY`,
`CONFIGS` (published shapes by name) and `Model(config, key)`.
"""

from distill_jax.models._decoder import Block as DecoderBlock
from distill_jax.models._decoder import Cache as DecoderCache
from distill_jax.models._seq2seq import Cache as Seq2SeqCache
from distill_jax.models._windows import GLOBAL, LOCAL

__all__ = ["GLOBAL", "LOCAL", "DecoderBlock", "DecoderCache", "Seq2SeqCache"]

SHARED = ("trainables", "loading", "runs")
