"""Description of a store: its manifest, sizes per token, and the targets of a sequence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distill_jax.records.fields import (
  ARGMAX,
  BEHAVIOUR_LOGP,
  ENTROPY,
  IDS,
  LABEL_LOGP,
  LOGP,
  WEIGHT,
  Record,
)
from distill_jax.records.store import Store
from distill_jax.types import JsonObject


def describe(store: Store) -> JsonObject:
  """Returns the manifest, without shards, and sizes, as JSON values by name.

  "bytes_per_token" is the size of all files divided by the number of non-padding positions. It is
  the sum of "payload.FIELD", the share of each field, and "container", the rest.
  """
  m = store.manifest
  tokens = sum(s.tokens for s in m.shards)
  targets = sum(s.targets for s in m.shards)
  size = sum(s.bytes for s in m.shards)
  entries = sum(s.entries for s in m.shards)
  fields = {name: sum(s.fields[name] for s in m.shards) for name in m.shards[0].fields}
  return {
    **m.identity,
    "folder": str(store.folder),
    "sequences": len(store),
    "shards": len(m.shards),
    "tokens": tokens,
    "targets": targets,
    "bytes": size,
    "entries_per_target": round(entries / max(targets, 1), 3),
    "bytes_per_token": round(size / max(tokens, 1), 3),
    **{f"payload.{name}": round(n / max(tokens, 1), 3) for name, n in fields.items()},
    "container": round((size - sum(fields.values())) / max(tokens, 1), 3),
  }


def show(store: Store, i: int, decode: Callable[[list[int]], str], top: int = 5) -> str:
  """Returns sequence i as text, one token per line, with the teacher's most probable next tokens.

  A line holds the position, segment and token. At positions with targets it also holds the
  teacher's entropy and log p(label), in nats, and candidates with their probabilities. `>` marks
  the label and `*` the teacher's argmax. In a text that a student wrote, it holds the student's
  log-probability of the label, too.

  Args:
    store: The store.
    i: Index of the sequence.
    decode: Returns the text of token ids.
    top: Number of candidates.
  """
  seq = store[i]
  tokens, mask = seq["tokens_T"], seq["mask_T"]

  def piece(token: int) -> str:
    return repr(decode([int(token)]))

  lines = []
  for t in np.flatnonzero(seq["segments_T"] > 0):
    line = f"{t:5d} {seq['segments_T'][t]:3d} {piece(tokens[t]):<16}"
    if mask[t] and BEHAVIOUR_LOGP.read in seq:
      line += f" student={seq[BEHAVIOUR_LOGP.read][t]:.2f}"
    if mask[t] and LABEL_LOGP.read in seq:
      label = int(tokens[t + 1]) if t + 1 < len(tokens) else None
      if ENTROPY.read in seq:
        line += f" H={seq[ENTROPY.read][t]:.2f}"
      line += f" label={seq[LABEL_LOGP.read][t]:.2f} "
      if IDS.read in seq:
        line += "  ".join(_candidates(seq, int(t), label, top, piece))
    lines.append(line.rstrip())
  return "\n".join(lines)


def _candidates(
  seq: Record, t: int, label: int | None, top: int, piece: Callable[[int], str]
) -> list[str]:
  """Returns the most probable entries of position t, with marks and probabilities."""
  p_K = seq[WEIGHT.read][t] if WEIGHT.read in seq else np.exp(seq[LOGP.read][t])
  out = []
  for k in np.argsort(-p_K, kind="stable")[:top]:
    if p_K[k] > 0:
      token = int(seq[IDS.read][t, k])
      marks = ">" * (token == label) + "*" * (token == int(seq[ARGMAX.read][t]))
      out.append(f"{marks}{piece(token)} {p_K[k]:.3f}")
  return out
