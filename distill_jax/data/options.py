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
  on_bad: str = "stop"  # stop | skip, what is to happen where a chat cannot be used
  trust: str = ""  # field of a chat's line: how far its labels are to be trusted, from 0 to 1, as
  # votes leave "agreement"; what is missing to 1 is label smoothing (losses/ce.py); "": 1
