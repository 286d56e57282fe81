"""Texts that a decoder is to say of a source: as fields of an example, and as a search for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from distill_jax.data import sources
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.tasks._skipped import LeftOut
from distill_jax.types import Inputs

HALF = re.compile("[\ud800-\udfff]")


def objects(of: sources.Source, left_out: LeftOut) -> Iterator[tuple[dict[str, Any], str]]:
  """The object on each line of .jsonl files, and where it stands; other lines are left out."""
  for raw, where in sources.raw_lines(of):
    try:
      line = json.loads(raw.decode())
    except (ValueError, RecursionError):  # of decoding, too
      left_out(where, "is no JSON in UTF-8")
      continue
    if isinstance(line, dict):
      yield line, where
    else:
      left_out(where, "is no JSON object")


def is_text(x: Any) -> bool:
  """Text with something in it. JSON can spell half a surrogate pair, which is no character."""
  return isinstance(x, str) and bool(x.strip()) and HALF.search(x) is None


def token_id(task: str, tokenizer: Tokenizer, token: str) -> int:
  if (found := tokenizer.token_id(token)) is None:
    raise InputError(f"{tokenizer.where} has no token {token!r}; name {task}'s as it spells them")
  return found


def fields(prompt: Sequence[int], ids: Sequence[int], eos: int, length: int) -> dict[str, Any]:
  """What the decoder reads and is to say; the prompt is given, and nothing of it learnt.

  The text and its end take len(prompt) - 1 + len(ids) + 1 positions of the `length` there are.
  """
  whole = [*prompt, *ids, eos]
  said_T, labels_T = np.zeros(length, np.int32), np.zeros(length, np.int32)
  mask_T, n = np.zeros(length, bool), len(whole) - 1
  said_T[:n], labels_T[:n], mask_T[len(prompt) - 1 : n] = whole[:-1], whole[1:], True
  return {"said_T": said_T, "labels_T": labels_T, "mask_T": mask_T}


def padded(ids: Sequence[int], length: int) -> dict[str, Any]:
  """Tokens that the encoder reads, and which of them are there."""
  read_S, seen_S = np.zeros(length, np.int32), np.zeros(length, np.int32)
  read_S[: len(ids)], seen_S[: len(ids)] = ids, 1
  return {"read_S": read_S, "seen_S": seen_S}


def as_inputs(tokens_BT: np.ndarray, segments_BT: np.ndarray) -> Inputs:
  places_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
  read: Any = (tokens_BT, places_BT, segments_BT)  # numpy until to_device
  return Inputs(*read)


def target(stack: Callable[[str], np.ndarray]) -> Inputs:
  said_BT = stack("said_T")
  return as_inputs(said_BT, np.ones_like(said_BT))


def check_start(task: str, start: int, config: Any) -> None:
  """Refuses a model that begins its texts with another token."""
  if start != config.decoder_start_token_id:
    raise InputError(
      f"{task} begins texts with token {start} and the model with {config.decoder_start_token_id} "
      "(decoder_start_token_id); set them alike"
    )
