"""What is recorded, and what `inspect` shows."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RecordsOptions:
  """What is stored of the teacher, and how the pass over the corpus runs."""

  kind: str = "sampled"  # sampled | topk | text | dense: all classes, for tasks of few
  task: str = ""  # which of `tasks`; "": the only one
  n: int = 63  # points of systematic sampling, or the k of topk
  logp: bool = False  # sampled: true log-probabilities beside the counts
  nucleus: float = 1.0  # topk: entries end where their mass reaches this
  missing_mass: str = "tail_bucket"  # topk: tail_bucket | renormalise
  temperature: float = 1.0
  taps: tuple[int, ...] = ()  # layers whose outputs are stored, int8
  tap_kind: str = "hidden"  # hidden | qkv, the layers' queries, keys and values
  taps_width: int = 0  # of a fixed random projection of the taps; 0: none
  logprobs: str = ""  # a JSONL dump of a served teacher's responses, instead of a teacher here
  logprobs_format: str = "vllm"  # vllm | sglang | openai
  batch_size: int = 8
  chunk: int = 128  # positions of each sequence whose logits exist at once
  sequences_per_shard: int = 1024


@dataclasses.dataclass(frozen=True)
class InspectOptions:
  """What `inspect` does beside describing a store."""

  sequence: int = -1  # shows this one, token by token; -1: none
  verify: bool = False  # reads every record and checks every digest
