"""Predictions of teacher and students at every token of some held-out texts."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from distill_jax.data import token_bytes
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.losses import DenseTargets
from distill_jax.nn import fused_head, sharding
from distill_jax.report.examples import STUDENTS, TEACHER, TOKENS, TOP, Prediction, Token
from distill_jax.training import token_metrics
from distill_jax.types import Batch, Inputs, PyTree

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
    texts: The texts so far, as tokens.
  """

  def __init__(
    self, count: int, tokenizer: Tokenizer, models: Sequence[str], mesh: jax.sharding.Mesh
  ):
    trained = [name for name in models if name not in (TEACHER, "start")]
    self._names = (TEACHER, *(trained or ["start"])[:STUDENTS])
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
      outputs: The hidden states and head of each model by name.
      batch: The batch. Rows without labels are padding.
    """
    rows = min(self._count - len(self.texts), len(batch.mask_BT))
    if rows < 1:
      return
    used = {name: outputs[name] for name in self._names}
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
      models = {name: self._prediction(row["models"][name], i) for name in self._names}
      yield Token(text, models if row["mask"][i] else {})

  def _prediction(self, model: Mapping[str, PyTree], i: int) -> Prediction:
    top = zip(model["top_ids"][i].tolist(), model["top_p"][i].tolist(), strict=True)
    spelled = ((self._bytes(k).decode("utf-8", "backslashreplace"), min(p, 1.0)) for k, p in top)
    return Prediction(min(float(model["p"][i]), 1.0), tuple(spelled), float(model["kl"][i]))


def predictions(
  outputs: Mapping[str, DenseTargets], batch: Batch, rows: int, vocab_size: int
) -> PyTree:
  """Computes the predictions of every model on P < TOKENS positions of the first rows.

  The logits of one row are in memory at a time: TOKENS * V floats for every model.

  Args:
    outputs: The hidden states and head of each model by name, including the teacher.
    batch: The batch, of packed text.
    rows: The number of rows.
    vocab_size: The number of tokens; further rows of the heads are padding.

  Returns:
    token, label, mask and real (False where the label is padding) [rows, P]; and in "models" for
    each model: p [rows, P], the probability of the label; top_ids and top_p [rows, P, TOP]; and
    kl [rows, P].
  """
  assert isinstance(batch.inputs, Inputs)
  first_B = jnp.argmax(batch.mask_BT[:rows], -1) - CONTEXT
  last = batch.mask_BT.shape[1] - 1  # the position whose label is in the next row
  P = min(last, TOKENS - 1)
  at_BP = jnp.clip(first_B, 0, last - P)[:, None] + jnp.arange(P)[None]

  def cut(x_BT: jax.Array, offset: int = 0) -> jax.Array:
    index_BP = at_BP.reshape(at_BP.shape + (1,) * (x_BT.ndim - 2)) + offset
    return jnp.take_along_axis(x_BT[:rows], index_BP, 1)

  def of_row(xs: tuple[jax.Array, Mapping[str, jax.Array]]) -> PyTree:
    label_P, hidden = xs

    def logits_1PV(name: str) -> jax.Array:
      model = outputs[name]
      assert model.head_VD is not None
      z_1PV = fused_head.logits(hidden[name][None], model.head_VD, vocab_size)
      return fused_head.soft_cap(z_1PV, model.soft_cap)

    teacher_1PV, found = logits_1PV(TEACHER), {}
    logp_PV = jax.nn.log_softmax(teacher_1PV)[0]
    for name in outputs:
      z_1PV = fused_head.fit_rows(logits_1PV(name), teacher_1PV)
      logq_PV = logp_PV if name == TEACHER else jax.nn.log_softmax(z_1PV)[0]
      top_logq, top_ids = jax.lax.top_k(logq_PV, TOP)
      found[name] = {
        "p": jnp.exp(fused_head.label_logp(logq_PV[None], label_P[None])[0]),
        "top_ids": top_ids,
        "top_p": jnp.exp(top_logq),
        "kl": token_metrics.kl_of_distributions(logp_PV, logq_PV),
      }
    return found

  label_BP = cut(batch.labels_BT)
  hidden = {name: cut(model.hidden_BTD) for name, model in outputs.items()}
  return {
    "token": cut(batch.inputs.tokens_BT),
    "label": label_BP,
    "mask": cut(batch.mask_BT),
    "real": cut(batch.inputs.segments_BT, 1) > 0,
    "models": jax.lax.map(of_row, (label_BP, hidden)),
  }
