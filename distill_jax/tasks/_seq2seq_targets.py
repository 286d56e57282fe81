"""Target texts of encoder-decoders, as fields of an example."""

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
  """Returns the id of a special token that a task's config names.

  Args:
    kind: Name of the task in the registry.
    tokenizer: The tokenizer.
    token: The token, e.g. "<pad>".

  Raises:
    InputError: The tokenizer does not have the token.
  """
  if (id_ := tokenizer.token_id(token)) is None:
    raise InputError(
      f"{tokenizer.where} has no token {token!r}. Correct the token in the config of the task "
      f"{kind}."
    )
  return id_


def target_fields(prompt: Sequence[int], ids: Sequence[int], eos: int, length: int) -> Example:
  """Returns the decoder's input `decoder_tokens_T`, `labels_T` and `mask_T`.

  The prompt, the text and its end token take len(prompt) + len(ids) of the `length` positions.

  Args:
    prompt: Tokens that every text begins with. They are not trained on.
    ids: Tokens of the text.
    eos: The end token.
    length: Number of positions, T.
  """
  whole = [*prompt, *ids, eos]
  decoder_tokens_T, labels_T = np.zeros(length, np.int32), np.zeros(length, np.int32)
  mask_T, n = np.zeros(length, bool), len(whole) - 1
  decoder_tokens_T[:n], labels_T[:n], mask_T[len(prompt) - 1 : n] = whole[:-1], whole[1:], True
  return {"decoder_tokens_T": decoder_tokens_T, "labels_T": labels_T, "mask_T": mask_T}


def target_inputs(stack: Stack) -> Inputs:
  """Returns the decoder's inputs for a batch with the fields of `target_fields`."""
  tokens_BT = stack("decoder_tokens_T")
  return _texts.as_inputs(tokens_BT, np.ones_like(tokens_BT))


def check_start(kind: str, start: int, config: Seq2SeqConfig) -> None:
  """Raises InputError if a model starts its texts with another token than a task."""
  if start != config.decoder_start_token_id:
    raise InputError(
      f"The task {kind} starts texts with token {start}, but the model's decoder_start_token_id is "
      f"{config.decoder_start_token_id}. Set both to the same token."
    )
