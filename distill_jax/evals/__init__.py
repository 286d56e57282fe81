"""Evaluation: benchmarks, one a file, and how models are measured on them and on held-out data.

A benchmark is a module with a frozen dataclass `Benchmark`, a subclass of `Benchmark` or
`GenerativeBenchmark` below, whose fields are its config keys. The folder is their registry, but
for the modules in SHARED.
"""

from distill_jax.evals._base import Benchmark, Choice, GenerativeBenchmark, PromptLine

__all__ = ["Benchmark", "Choice", "GenerativeBenchmark", "PromptLine"]

SHARED = (
  "generative",
  "heldout",
  "likelihood",
  "lm_eval",
  "model_slot",
  "multiple_choice",
  "next_token",
  "questions",
  "retrieval",
  "similarity",
)
