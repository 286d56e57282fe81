"""Config section `evaluate`: the models to evaluate, and how."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """Settings of the command `evaluate`: the held-out loss, and the benchmarks in `evals`.

  Benchmarks are sampled with the settings in `generate` (`chat`, `stop`, `repetition`,
  `cache_len`, `cache_dtype`, `batch_size`, `prefill_rows`, `prefill_chunk`, `steps` and `server`),
  except for the keys below.
  """

  models: dict[str, str] = dataclasses.field(default_factory=dict)
  """Models to evaluate besides the teacher, as NAME: SOURCE. The source of a served model is the
  server's address, e.g. "http://localhost:8000/v1", or "http://localhost:8000/v1#MODEL" if the
  server has several models."""
  heldout: bool = True
  """True to compute the loss on held-out data, for `models`, the teacher, and "start" (the student
  before training)."""
  sequences: int = 0
  """Maximum number of held-out sequences or examples. 0: all."""
  batch_size: int = 8
  """Batch size for held-out data and for the choices of multiple-choice benchmarks."""
  chunk: int = 128
  """Number of positions per sequence whose logits are in memory at once."""
  texts: int = 0
  """Number of held-out texts of `data` on which the bits per byte of all models are computed, each
  with its own tokenizer. 0: none. Needed for models whose tokenizer is not the teacher's."""
  examples: int = 3
  """Number of texts and of prompts in examples.json: held-out texts with the predictions of all
  models at each token, and prompts with a greedy continuation by each model. 0: none. If `heldout`
  is False, the texts are those of train.heldout, with the teacher's recorded predictions."""
  prompts: str = ""
  """Path or URL of the prompts for the examples, in a form of generate.prompts; the first
  `examples` of them are used. "": the beginnings of held-out texts."""
  on: tuple[str, ...] = ()
  """Models to run the benchmarks on: names in `models`, "teacher" or "start". (): all of
  `models`, or the teacher if `models` is empty."""
  samples: int = 1
  """Number of samples per question. DeepSeek-R1's protocol uses 64."""
  temperature: float = 0.6
  """Sampling temperature. 0: greedy decoding."""
  top_p: float = 0.95
  """Probability mass of the nucleus to sample from, in (0, 1]. 1: all tokens."""
  max_new_tokens: int = 1024
  """Maximum number of generated tokens per sample. DeepSeek-R1's protocol uses 32,768."""
  on_bad: str = "stop"
  """Action at a question that cannot be used: "stop" (raise an error) or "skip" (skip and count
  it)."""

  def __post_init__(self) -> None:
    if self.chunk < 1:
      raise bad_value("evaluate.chunk", self.chunk, "at least 1", "Raise it")
