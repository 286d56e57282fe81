"""Config section `evaluate`: what is measured of models."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """What `evaluate` measures: the loss on held-out data, and the benchmarks in `evals`.

  Answers to benchmarks are sampled with the keys here. How they are prompted and decoded is in
  section `generate`, so that a model is evaluated as it is sampled from: chat, stop (where the
  benchmark has none), repetition, cache_len, cache_dtype, batch_size, prefill_rows,
  prefill_chunk, steps, and the teacher's server.
  """

  models: dict[str, str] = dataclasses.field(default_factory=dict)  # name: source; of a server its
  # address, such as http://localhost:8000/v1, or http://…/v1#MODEL where it has several
  heldout: bool = True  # the loss on held-out data, also of the teacher and of "start", the student
  # before training
  sequences: int = 0  # held-out sequences; 0: all
  batch_size: int = 8  # sequences at once, of held-out text and of choices
  chunk: int = 128  # positions of each row whose logits exist at once
  on: tuple[str, ...] = ()  # the models that the benchmarks run on: names in `models`, "teacher" or
  # "start"; (): all of `models`, else the teacher
  samples: int = 1  # of each question; DeepSeek-R1's protocol: 64 …
  temperature: float = 0.6
  top_p: float = 0.95
  max_new_tokens: int = 1024  # … and 32,768
  on_bad: str = "stop"  # stop | skip, where a question cannot be used
