"""The loss by rounding a model's weights, measured on rows of the text of a config.

The model in float32, p, is compared with the same model with rounded weights, q, at every label:
KL(p || q), and the difference of the cross-entropies. All products are computed in float32, because
bfloat16 rounds as coarsely as 8-bit integers do.

A process holds its part of the model in float32, that of the head a second time, and the hidden
states of the text: 2,048 tokens of a model of width 7,168 are 59 MB.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.evals import next_token
from distill_jax.losses import DenseTargets
from distill_jax.models.loading import ModelSource
from distill_jax.nn import params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.records import collate
from distill_jax.training.outputs import run_teacher
from distill_jax.types import Batch, Mean, Model


class Loss(NamedTuple):
  """The loss by rounding.

  Attributes:
    kl: KL(p || q) of the float model p and the rounded model q, in nats per token.
    increase: the increase of the cross-entropy, in nats per token.
  """

  kl: float
  increase: float


class Calibration:
  """Text, and the predictions of a float model at all of its labels.

  Args:
    model: the model, with weights in float32; see `as_float32`.
    batches: the text; see `read_text`.
    compute: the settings of the model's computation, except its dtype and rounding.
    mesh: the mesh.
    chunk: the number of positions per row whose logits are in memory at once.
    vocab_size: the number of tokens.
  """

  def __init__(
    self,
    model: Model,
    batches: Sequence[Batch],
    compute: ComputeConfig,
    mesh: Mesh,
    chunk: int,
    vocab_size: int,
  ):
    compute = dataclasses.replace(compute, dtype="float32", quantise=QuantiseOptions())
    self._batches, self._mesh = batches, mesh
    forward = jax.jit(functools.partial(run_teacher, compute=compute))
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
      outputs = (forward(model, batch.inputs)[0] for batch in batches)
      first = next(outputs)
      self._head_VD = first.head_VD  # a single copy of it, not one for each batch
      hidden = [first.replace(head_VD=None), *(o.replace(head_VD=None) for o in outputs)]
    self._float: list[DenseTargets] = hidden
    self._compare = jax.jit(
      functools.partial(_compare, compute=compute, chunk=chunk, vocab_size=vocab_size),
      out_shardings=sharding.replicated(mesh),
    )

  def loss(self, model: Model) -> Loss:
    """Returns the loss of a model with rounded weights, which are in float32 as well."""
    with jax.set_mesh(self._mesh), jax.default_matmul_precision("float32"):
      sums = [
        jax.device_get(self._compare(model, f.replace(head_VD=self._head_VD), batch))
        for f, batch in zip(self._float, self._batches, strict=True)
      ]
    count = math.fsum(float(row["kl"].count) for row in sums)
    mean = {n: math.fsum(float(row[n].total) for row in sums) / count for n in sums[0]}
    return Loss(mean["kl"], mean["ce"] - mean["float_ce"])


def _compare(
  model: Model,
  reference: DenseTargets,
  batch: Batch,
  *,
  compute: ComputeConfig,
  chunk: int,
  vocab_size: int,
) -> dict[str, Mean]:
  """Returns "kl", "ce" and "float_ce", the cross-entropy of the float model."""
  rounded, _ = run_teacher(model, batch.model_inputs, compute)
  outputs = {"float": reference, "rounded": rounded}
  means = next_token.compare(outputs, batch, chunk, vocab_size, teacher="float")
  row = means["rounded"]
  return {"kl": row["kl"], "ce": row["ce"], "float_ce": means["float"]["ce"]}


def as_float32(model: Model) -> Model:
  """Returns the model with weights in float32; those that are, are not copied."""
  return params.map_params(lambda v: v.replace(v[...].astype(jnp.float32)), model)


class Text(NamedTuple):
  """Rows of a corpus.

  Attributes:
    batches: the rows.
    digest: SHA-256 of their tokens, in hex.
    labels: the number of labels.
    vocab_size: the number of tokens of the vocabulary.
  """

  batches: list[Batch]
  digest: str
  labels: int
  vocab_size: int


def read_text(config: Config, source: ModelSource, mesh: Mesh) -> Text:
  """Returns the first rows of config.data that hold export.calibration_tokens.

  They are in the split that students are trained on. Every process reads all of them.

  Args:
    config: the config.
    source: the model.
    mesh: the mesh.

  Raises:
    InputError: the text cannot be read, or does not fit the model.
  """
  data, tokens = config.data, config.export.calibration_tokens
  try:
    tokenizer = corpus.tokenizer_of(data, source.pretrained)
    shape = source.text_config
    corpus.check(data, tokenizer, shape.vocab_size, shape.max_position_embeddings)
    data = dataclasses.replace(data, split="train", sequences=-(-tokens // data.seq_len))
    rows = list(corpus.sequences(data, tokenizer, source.pretrained))
  except InputError as e:
    raise InputError(
      f"{e} The loss by rounding is measured on text of `data`; with export.calibration_tokens=0 "
      "it is not measured."
    ) from e
  labels = sum(int(row["mask_T"].sum()) for row in rows)
  if not labels:
    raise InputError(
      "`data` has no text to measure the loss by rounding on. Choose a larger corpus, or set "
      "export.calibration_tokens=0."
    )
  shards = sharding.row_shards(mesh)
  size = min(config.evaluate.batch_size, len(rows))
  held = sharding.rows(mesh, shards * -(-size // shards))
  batches = [collate.to_device(b, held) for b in collate.padded_batches(rows, held)]
  hashed = hashlib.sha256()
  for row in rows:
    for name in sorted(row):
      hashed.update(row[name].tobytes())
  return Text(batches, hashed.hexdigest(), labels, tokenizer.vocab_size)
