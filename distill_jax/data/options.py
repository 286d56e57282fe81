"""The corpus."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """The corpus that is packed into sequences."""

  kind: str = "text"  # pydoc | text | jsonl | chat | tfds
  path: str = ""
  split: str = "train"
  field: str = "text"
  heldout_fraction: float = 0.1
  tokenizer: str = ""  # "": the model's own
  seq_len: int = 1024
  sequences: int = 0  # at most this many; 0: all
  on_bad: str = "stop"  # stop | skip, where a chat cannot be used
  trust: str = ""  # name of a per-example confidence field in [0, 1], such as "agreement", which
  # the filter `votes` writes; 1 - confidence is used as label smoothing (losses/ce.py); "": 1
