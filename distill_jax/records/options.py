"""Options of the `record` and `inspect` commands."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import bad_value, check_choice

KINDS = ("sampled", "topk", "dense", "labels", "text")
MAX_SEQUENCES = 2**14  # of a shard: an example of a task may have a single token


@dataclasses.dataclass(frozen=True)
class RecordsOptions:
  """Options for recording: the stored targets, the source of the outputs, and the batches."""

  kind: str = "sampled"
  """Targets stored per token: "sampled", "topk", "dense" (all classes), "labels" or "text" (none).

  "sampled" stores tokens drawn from the teacher's distribution, which gives unbiased estimates of
  the KL divergence. "dense" is for tasks with few classes. "labels" stores the log-probability of
  each label alone, for the losses policy_gradient, log_ratio and alm.
  """
  task: str = ""
  """Name of the entry of `tasks` to record; "" for the only one."""
  n: int = 63
  """Number of sampling points per token for "sampled"; k for "topk"."""
  logp: bool = False
  """True to store the exact log-probabilities of sampled tokens with their counts."""
  nucleus: float = 1.0
  """Probability mass at which the entries of "topk" are cut; 1 for no cut."""
  missing_mass: str = "tail_bucket"
  """Treatment of the mass outside the entries of "topk": "tail_bucket" or "renormalise".

  "tail_bucket" treats all other tokens as one further outcome. "renormalise" rescales the entries
  to sum to 1.
  """
  temperature: float = 1.0
  """Temperature of the recorded distribution."""
  student_tokenizer: str = ""
  """Tokenizer of a student that has another one than the teacher: a tokenizer.json, a sentencepiece
  model, or a folder with one of them; a path, a URL or hub:ORG/NAME. The text is packed in the
  teacher's tokens, and recorded in the student's, with the teacher's exact distributions over them;
  see `retarget` for further keys. "": the teacher's tokenizer."""
  taps: tuple[int, ...] = ()
  """Teacher layers whose features are stored, in int8, for feature losses; () for none."""
  tap_kind: str = "hidden"
  """Features stored for `taps`: "hidden" states, or "qkv" for queries, keys and values."""
  taps_width: int = 0
  """Width of a fixed random projection of the tapped features; 0 for no projection."""
  logprobs: str = ""
  """Path of a JSONL dump of a served teacher's responses to import, a file or a folder of files; ""
  runs the teacher."""
  logprobs_format: str = "vllm"
  """Format of `logprobs`: "vllm", "sglang" or "openai"."""
  served: bool = False
  """True if the servers in generate.server run the teacher: they get the tokens of the text, and
  give the log-probabilities for "topk" or "labels"."""
  heldout_sequences: int = 0
  """Maximum number of sequences of the held-out split that `record` and `pack` store too, in the
  folder `heldout` of the workdir, for train.heldout; 0 for none."""
  batch_size: int = 8
  """Number of sequences per batch, over all devices; of data.buckets, those of the longest
  length."""
  chunk: int = 128
  """Number of positions per sequence, of the longest length, whose logits are in memory at once."""
  tokens_per_shard: int = 2**20
  """Number of tokens per shard file, rounded down to whole sequences, of which it has at least one
  and at most 16,384.

  A command that is stopped loses the shards that it has begun, at most one per process. The default
  makes shards of about 32 MB. A store that is resumed or extended keeps the size of its shards.
  """

  def __post_init__(self) -> None:
    check_choice("records.kind", self.kind, KINDS, "Correct it")
    if self.chunk < 1:
      raise bad_value("records.chunk", self.chunk, "at least 1", "Raise it")

  def sequences_per_shard(self, positions: int) -> int:
    """Returns the number of sequences of `positions` tokens that make a shard.

    Raises:
      InputError: `tokens_per_shard` is not positive.
    """
    if (tokens := self.tokens_per_shard) < 1:
      raise bad_value("records.tokens_per_shard", tokens, "at least 1", "Raise it")
    return min(max(1, tokens // positions), MAX_SEQUENCES)


@dataclasses.dataclass(frozen=True)
class InspectOptions:
  """Options of the `inspect` command, which describes a store of records."""

  sequence: int = -1
  """Index of a sequence to print token by token; -1 for none."""
  verify: bool = False
  """True to read every record and check every shard's digest."""
