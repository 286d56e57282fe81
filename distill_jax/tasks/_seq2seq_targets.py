"""Texts that an encoder-decoder outputs, as fields of an example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.tasks import _texts
from distill_jax.tasks._base import Example, Stack
from distill_jax.tasks._model_configs import Seq2SeqConfig
from distill_jax.types import Inputs


def token_id(kind: str, tokenizer: Tokenizer, token: str) -> int:
  """Returns the id of a token that a task of this kind names."""
  if (id_ := tokenizer.token_id(token)) is None:
    raise InputError(f"{tokenizer.where} has no token {token!r}; name {kind}'s as it spells them")
  return id_


def target_fields(prompt: Sequence[int], ids: Sequence[int], eos: int, length: int) -> Example:
  """Returns `decoder_tokens_T`, what the decoder reads, and its labels and mask.

  The text and its end take len(prompt) - 1 + len(ids) + 1 positions of the `length` there are.

  Args:
    prompt: the tokens that every text begins with; they are not trained on.
    ids: the text.
    eos: the token that ends it.
    length: T.
  """
  whole = [*prompt, *ids, eos]
  decoder_tokens_T, labels_T = np.zeros(length, np.int32), np.zeros(length, np.int32)
  mask_T, n = np.zeros(length, bool), len(whole) - 1
  decoder_tokens_T[:n], labels_T[:n], mask_T[len(prompt) - 1 : n] = whole[:-1], whole[1:], True
  return {"decoder_tokens_T": decoder_tokens_T, "labels_T": labels_T, "mask_T": mask_T}


def target_inputs(stack: Stack) -> Inputs:
  """Returns what the decoder reads of a batch with the fields of `target_fields`."""
  tokens_BT = stack("decoder_tokens_T")
  return _texts.as_inputs(tokens_BT, np.ones_like(tokens_BT))


def check_start(kind: str, start: int, config: Seq2SeqConfig) -> None:
  """Refuses a model that begins its texts with another token."""
  if start != config.decoder_start_token_id:
    raise InputError(
      f"{kind} begins texts with token {start} and the model with {config.decoder_start_token_id} "
      "(decoder_start_token_id); set them alike"
    )
