"""Predictions of teacher and students at every token of some held-out texts.

The teacher's are exact where it runs. Otherwise they are read from a held-out store of records: of
the k most probable tokens, or estimated from samples.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.data import token_bytes
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.losses import DenseTargets, LabelTargets, SampledTargets, TopKTargets
from distill_jax.nn import fused_head, sharding
from distill_jax.report.examples import STUDENTS, TEACHER, TOKENS, TOP, Prediction, Token
from distill_jax.training import token_metrics
from distill_jax.types import Batch, Inputs, PyTree, Targets

CONTEXT = 16  # tokens before the first one that is predicted, e.g. the end of a chat's prompt


class TokenView:
  """Collects the predictions of models on a part of the first texts.

  Args:
    count: The number of texts.
    tokenizer: The tokenizer of the models.
    models: The names of the evaluated models. The view has the teacher and the first STUDENTS
      students; "start", the student before training, only if there is no other.
    mesh: The devices.

  Attributes:
    students: The names of the students.
    texts: The texts so far, as tokens.
  """

  def __init__(
    self, count: int, tokenizer: Tokenizer, models: Sequence[str], mesh: jax.sharding.Mesh
  ):
    trained = [name for name in models if name not in (TEACHER, "start")]
    self.students = (trained or ["start"])[:STUDENTS]
    self.texts: list[tuple[Token, ...]] = []
    self._count, self._bytes = count, token_bytes.reader(tokenizer)
    self._predict = jax.jit(
      functools.partial(predictions, vocab_size=tokenizer.vocab_size),
      static_argnames=("rows",),
      out_shardings=sharding.replicated(mesh),
    )

  def add(self, outputs: Mapping[str, DenseTargets], batch: Batch) -> None:
    """Adds the texts of a batch, until there are `count`.

    Args:
      outputs: The hidden states and head of each model by name. Without the teacher's, its
        predictions are those of its recorded targets in the batch.
      batch: The batch. Rows without labels are padding.
    """
    rows = min(self._count - len(self.texts), len(batch.mask_BT))
    if rows < 1:
      return
    used = {name: outputs[name] for name in (TEACHER, *self.students) if name in outputs}
    found = jax.device_get(self._predict(used, batch, rows=rows))
    for i in range(rows):
      if found["mask"][i].any():
        self.texts.append(tuple(self._tokens(jax.tree.map(lambda x, i=i: x[i], found))))

  def _tokens(self, row: PyTree) -> Iterator[Token]:
    """Yields the tokens of a row. The predictions of a token were made at the one before it.

    A character that several tokens spell is shown at the last of them, where it is complete.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    yield Token(utf8.decode(self._bytes(int(row["token"][0]))), {})
    for i, label in enumerate(row["label"][: row["real"].sum()].tolist()):
      text = utf8.decode(self._bytes(label))
      models = {name: self._prediction(model, i) for name, model in row["models"].items()}
      yield Token(text, models if row["mask"][i] else {})

  def _prediction(self, model: Mapping[str, PyTree], i: int) -> Prediction:
    top = zip(model["top_ids"][i].tolist(), model["top_p"][i].tolist(), strict=True)
    spelled = (
      (self._bytes(k).decode("utf-8", "backslashreplace"), min(p, 1.0)) for k, p in top if p != 0
    )
    p = min(float(model["p"][i]), 1.0) if "p" in model else None
    return Prediction(p, tuple(spelled), float(model["kl"][i]))


def predictions(
  outputs: Mapping[str, DenseTargets], batch: Batch, rows: int, vocab_size: int
) -> PyTree:
  """Computes the predictions of every model on P < TOKENS positions of the first rows.

  The logits of one row are in memory at a time: TOKENS * V floats for every model.

  Args:
    outputs: The hidden states and head of each model by name. Without the teacher's, its
      predictions are those of its recorded targets.
    batch: The batch, of packed text.
    rows: The number of rows.
    vocab_size: The number of tokens; further rows of the heads are padding.

  Returns:
    token, label, mask and real (False where the label is padding) [rows, P]; and in "models" for
    each model: p [rows, P], the probability of the label, if it is known; top_ids and top_p
    [rows, P, TOP]; and kl [rows, P].
  """
  assert isinstance(batch.inputs, Inputs)
  first_B = jnp.argmax(batch.mask_BT[:rows], -1) - CONTEXT
  last = batch.mask_BT.shape[1] - 1  # the position whose label is in the next row
  P = min(last, TOKENS - 1)
  at_BP = jnp.clip(first_B, 0, last - P)[:, None] + jnp.arange(P)[None]

  def cut(x_BT: jax.Array, offset: int = 0) -> jax.Array:
    index_BP = at_BP.reshape(at_BP.shape + (1,) * (x_BT.ndim - 2)) + offset
    return jnp.take_along_axis(x_BT[:rows], index_BP, 1)

  def of_row(row: PyTree) -> PyTree:
    """Returns the predictions for one row of `hidden`, `labels` and `targets`."""
    logits = {
      name: fused_head.soft_cap(
        fused_head.logits(hidden_PD[None], heads[name], vocab_size), outputs[name].soft_cap
      )
      for name, hidden_PD in row["hidden"].items()
    }
    if TEACHER in logits:
      like_1PV = logits[TEACHER]
      logq = {n: jax.nn.log_softmax(fused_head.fit_rows(z, like_1PV)) for n, z in logits.items()}
      kls = {n: token_metrics.kl_of_distributions(logq[TEACHER], x) for n, x in logq.items()}
      found = {}
    else:
      targets = jax.tree.map(lambda x: x[None], row["targets"])
      logq = {n: jax.nn.log_softmax(z) for n, z in logits.items()}
      kls = {n: targets.forward_kl(z, 1.0) for n, z in logits.items()}
      found = {TEACHER: _recorded(row["targets"])}
    for name, logq_1PV in logq.items():
      top_logq, top_ids = jax.lax.top_k(logq_1PV[0], TOP)
      p_P = jnp.exp(fused_head.label_logp(logq_1PV, row["labels"][None])[0])
      top = {"top_ids": top_ids, "top_p": jnp.exp(top_logq)}
      found[name] = top | {"p": p_P, "kl": kls[name][0]}
    return found

  label_BP = cut(batch.labels_BT)
  heads: Any = {name: model.head_VD for name, model in outputs.items()}
  rows_of = {
    "labels": label_BP,
    "hidden": {name: cut(model.hidden_BTD) for name, model in outputs.items()},
  }
  if TEACHER not in outputs:
    rows_of["targets"] = jax.tree.map(cut, batch.targets[TEACHER].replace(taps_BPTD=None))
  return {
    "token": cut(batch.inputs.tokens_BT),
    "label": label_BP,
    "mask": cut(batch.mask_BT),
    "real": cut(batch.inputs.segments_BT, 1) > 0,
    "models": jax.lax.map(of_row, rows_of),
  }


def _recorded(targets: Targets) -> PyTree:
  """Returns the predictions of a recorded teacher for one row; unused entries have p = 0."""
  if isinstance(targets, LabelTargets):
    p_PK = jnp.zeros((*targets.label_logp_BT.shape, 1))
    ids_PK = p_PK.astype(jnp.int32)
  elif isinstance(targets, SampledTargets):
    p_PK, ids_PK = targets.weight_BTK, targets.ids_BTK
  else:
    assert isinstance(targets, TopKTargets)
    p_PK, ids_PK = jnp.exp(targets.logp_BTK), targets.ids_BTK
  top_p, at = jax.lax.top_k(p_PK, min(TOP, p_PK.shape[-1]))
  top_ids = jnp.take_along_axis(ids_PK, at, -1)
  found = {"top_ids": top_ids, "top_p": top_p, "kl": jnp.zeros_like(p_PK[:, 0])}
  if targets.label_logp_BT is not None:
    found["p"] = jnp.exp(targets.label_logp_BT)
  return found
