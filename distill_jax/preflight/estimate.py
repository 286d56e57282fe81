"""Estimates that need no compilation: bytes of arguments, number of tokens, bytes of records."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.config import Config
from distill_jax.generation import placement
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.nn import params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.preflight import programs
from distill_jax.records.store import Manifest
from distill_jax.training import heldout, state
from distill_jax.types import JsonObject, PyTree

# Entries per token for n sampled points, measured on SmolLM2-135M at an entropy of 1.6 nats.
_ENTRIES = {32: 8.6, 63: 12.7, 255: 29.3}


def record_bytes_per_token(manifest: Manifest) -> float:
  """Estimates the bytes per token of a store before it is recorded.

  From measurements (records/elias_fano.py): an id takes about 3 bits less than the width of the
  vocabulary, a count about 2 bits, a log-probability 16 bits, entropy and label together 4 bytes,
  a scalar of a rollout 2 bytes, and the token itself the width of the vocabulary. The number of
  entries depends on the entropy of the teacher; 1.6 nats is assumed.
  """
  width = math.ceil(math.log2(manifest.vocab_size))
  rollout = 2 * len(manifest.spec.rollout)
  if manifest.kind == "text":
    return width / 8 + rollout
  if manifest.kind == "labels":
    entries, bits = 0.0, 0
  elif manifest.kind in ("topk", "dense"):
    entries, bits = float(manifest.n), width - 3 + 16
  else:
    points = np.log(list(_ENTRIES)), np.log(list(_ENTRIES.values()))
    slope = np.diff(points[1])[-1] / np.diff(points[0])[-1]
    beyond = max(0.0, math.log(manifest.n / max(_ENTRIES))) * slope
    entries = min(manifest.n, math.exp(np.interp(math.log(manifest.n), *points) + beyond))
    bits = width - 3 + 2 + 16 * manifest.logp
  taps = len(manifest.taps.layers) * (manifest.taps.width + 4) if manifest.taps else 0
  return (width + entries * bits) / 8 + 2 + 2 * manifest.entropy + taps + rollout


def total_tokens(config: Config, verb: str) -> int:
  """Returns the number of tokens in the whole run; 0 if the config has no length of the corpus."""
  if verb == "record":
    return config.data.sequences * config.data.seq_len
  return config.train.steps * config.train.batch_size * config.data.seq_len


def evaluation_share(config: Config, verb: str) -> float | None:
  """Returns the computation of evaluation as a share of that of training steps, at most.

  An evaluation needs less memory than a step (training/heldout.py), so it is not compiled here.

  Returns:
    The share; 0 without train.heldout, and None if the config does not have the number of rows
    (records.heldout_sequences).
  """
  c = config.train
  if verb != "train" or not c.heldout:
    return 0.0
  if not c.eval_every:
    return heldout.SHARE
  rows = config.records.heldout_sequences
  forward = heldout.forward_share(config, loading.open_source(config.student).trainable)
  return forward * math.ceil(rows / c.batch_size) / c.eval_every if rows else None


def store_size(config: Config, verb: str) -> JsonObject:
  """Estimates the size of the records: `store_bytes_per_token`, `tokens` and `store_bytes`.

  All three have the value None for tasks, and the last two if the length of the corpus is unknown.
  """
  if config.tasks:
    return {"store_bytes_per_token": None, "tokens": None, "store_bytes": None}
  per_token = round(record_bytes_per_token(programs.planned_manifest(config)), 1)
  total = total_tokens(config, verb)
  # If the length of the corpus is unknown, the tokens seen in training are an upper bound.
  stored = total_tokens(config, "record") or total
  return {
    "store_bytes_per_token": per_token,
    "tokens": total or None,
    "store_bytes": round(stored * per_token) if stored else None,
  }


def argument_bytes(config: Config, verb: str, mesh: jax.sharding.Mesh) -> int:
  """Computes the bytes per device of parameters, optimizer and teacher without compiling."""
  if verb == "record":
    return model_bytes(loading.open_source(config.teacher), mesh)
  teachers = state.online_teachers(config)
  teacher = sum(model_bytes(source, mesh) for source in teachers.values())
  student = loading.open_source(config.student)
  trained = _placed_bytes(student.abstract_trainable, student.compute, mesh)
  width = jnp.dtype(config.student.param_dtype).itemsize
  base = model_bytes(student, mesh) if student.trainable.has_base else 0
  part, _ = params.split(student.abstract_trainable, student.trainable.frozen)
  moments = _placed_bytes(part, student.compute, mesh) * 8 / width  # both are in float32
  return round(teacher + base + trained + moments)


def model_bytes(source: ModelSource, mesh: jax.sharding.Mesh) -> int:
  """Returns the bytes per device of a model's parameters."""
  return _placed_bytes(source.abstract, source.compute, mesh)


def _placed_bytes(tree: PyTree, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> int:
  where = sharding.shardings(tree, mesh, compute.rules)
  return placement.bytes_per_device(sharding.with_shardings(tree, where))
