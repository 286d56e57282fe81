"""Looking into a store: what it is, what a token costs, what the teacher said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from distill_jax.records.store import Store


def describe(store: Store) -> dict[str, Any]:
  """The manifest without its shards, and figures: flat names, JSON values.

  bytes_per_token counts whole files, over positions that are not padding; payload.FIELD is
  what each field takes of it, and container the rest.
  """
  m = store.manifest
  total = lambda name: sum(getattr(s, name) for s in m.shards)
  tokens = max(total("tokens"), 1)
  fields = {name: sum(s.fields[name] for s in m.shards) for name in m.shards[0].fields}
  return {
    **m.identity,
    "folder": str(store.folder),
    "sequences": len(store),
    "shards": len(m.shards),
    "tokens": total("tokens"),
    "targets": total("targets"),
    "bytes": total("bytes"),
    "entries_per_target": round(total("entries") / max(total("targets"), 1), 3),
    "bytes_per_token": round(total("bytes") / tokens, 3),
    **{f"payload.{name}": round(size / tokens, 3) for name, size in fields.items()},
    "container": round((total("bytes") - sum(fields.values())) / tokens, 3),
  }


def show(store: Store, i: int, decode: Callable[[list[int]], str], top: int = 5) -> str:
  """Sequence i, one token a line, with the teacher's likeliest next tokens.

  A line holds the position, the segment, the token, then (where there are targets) the
  teacher's entropy and log p of the label in nats, and candidates with their probability;
  `>` marks the token that followed and `*` the teacher's argmax.
  """
  seq = store[i]
  tokens, mask = seq["tokens_T"], seq["mask_T"]
  piece = lambda token: repr(decode([int(token)]))
  lines = []
  for t in np.flatnonzero(seq["segments_T"] > 0):
    line = f"{t:5d} {seq['segments_T'][t]:3d} {piece(tokens[t]):<16}"
    if mask[t] and "ids_TK" in seq:
      label = int(tokens[t + 1]) if t + 1 < len(tokens) else None
      if "entropy_T" in seq:
        line += f" H={seq['entropy_T'][t]:.2f}"
      line += f" label={seq['label_logp_T'][t]:.2f} "
      line += "  ".join(_candidates(seq, t, label, top, piece))
    lines.append(line.rstrip())
  return "\n".join(lines)


def _candidates(seq, t, label, top, piece) -> list[str]:
  p_K = np.exp(seq["logp_TK"][t]) if "weight_TK" not in seq else seq["weight_TK"][t]
  out = []
  for k in np.argsort(-p_K, kind="stable")[:top]:
    if p_K[k] > 0:
      token = int(seq["ids_TK"][t, k])
      marks = ">" * (token == label) + "*" * (token == int(seq["argmax_T"][t]))
      out.append(f"{marks}{piece(token)} {p_K[k]:.3f}")
  return out
