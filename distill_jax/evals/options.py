"""What `evaluate` measures."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """What `evaluate` measures: loss on held-out text, and the sets in `evals`.

  Samples of sets are taken as `generate` takes them, with its keys but for those here.
  """

  models: dict[str, str] = dataclasses.field(default_factory=dict)  # name: source; of a server
  # its address, as http://localhost:8000/v1, or http://…/v1#MODEL where it has several
  heldout: bool = True  # the loss on held-out text, of the teacher and "start", the student
  # before training, too
  sequences: int = 0  # held-out sequences; 0: all
  batch_size: int = 8  # sequences at once, of text and of choices
  on: tuple[str, ...] = ()  # who is asked the sets: of `models`, "teacher" and "start"; ():
  # all of `models`, or the teacher where there are none
  samples: int = 1  # of each question; DeepSeek-R1's protocol: 64 …
  temperature: float = 0.6
  top_p: float = 0.95
  max_new_tokens: int = 1024  # … and 32,768
  on_bad: str = "stop"  # stop | skip, what is to happen where a question cannot be used
