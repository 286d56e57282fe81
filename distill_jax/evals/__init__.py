"""Evaluation of models on benchmarks and on held-out data.

A benchmark is a module of this package with a frozen dataclass `Benchmark`, a subclass of
`Benchmark` or `GenerativeBenchmark` below, whose fields are its config keys. All public modules
except those in SHARED are benchmarks.
"""

from distill_jax.evals._base import Benchmark, Choice, GenerativeBenchmark, PromptLine

__all__ = ["Benchmark", "Choice", "GenerativeBenchmark", "PromptLine"]

SHARED = (
  "benchmarks",
  "bits_per_byte",
  "generative",
  "heldout",
  "in_training",
  "likelihood",
  "lm_eval",
  "model_slot",
  "multiple_choice",
  "next_token",
  "questions",
  "retrieval",
  "side_by_side",
  "similarity",
  "token_view",
)
