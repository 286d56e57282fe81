"""What a run takes before anything is compiled: bytes of arguments, tokens, bytes of records."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.config import Config
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.preflight import programs
from distill_jax.records.store import Manifest
from distill_jax.training import state
from distill_jax.types import JsonObject, PyTree

# Entries of systematic sampling of n points, measured on SmolLM2-135M at 1.6 nats of entropy.
_ENTRIES = {32: 8.6, 63: 12.7, 255: 29.3}


def record_bytes_per_token(manifest: Manifest) -> float:
  """Estimates the bytes a token of a store, before it is made.

  Measured (records/elias_fano.py): an id takes about 3 bits less than the vocabulary's width,
  a count about 2, a log-probability 16; entropy and label 4 bytes together, the token its
  own width. Entries depend on the teacher's entropy; 1.6 nats is taken.
  """
  width = math.ceil(math.log2(manifest.vocab_size))
  if manifest.kind == "text":
    return width / 8
  if manifest.kind in ("topk", "dense"):
    entries, bits = float(manifest.n), width - 3 + 16
  else:
    points = np.log(list(_ENTRIES)), np.log(list(_ENTRIES.values()))
    slope = np.diff(points[1])[-1] / np.diff(points[0])[-1]
    beyond = max(0.0, math.log(manifest.n / max(_ENTRIES))) * slope
    entries = min(manifest.n, math.exp(np.interp(math.log(manifest.n), *points) + beyond))
    bits = width - 3 + 2 + 16 * manifest.logp
  taps = len(manifest.taps.layers) * (manifest.taps.width + 4) if manifest.taps else 0
  return (width + entries * bits) / 8 + 2 + 2 * manifest.entropy + taps


def total_tokens(config: Config, verb: str) -> int:
  """Tokens of the whole run; 0 where the config does not say how long its corpus is."""
  if verb == "record":
    return config.data.sequences * config.data.seq_len
  return config.train.steps * config.train.batch_size * config.data.seq_len


def store_size(config: Config, verb: str) -> JsonObject:
  """Estimates the size of the records: `store_bytes_per_token`, `tokens` and `store_bytes`.

  All are None for tasks; the last two where the config does not say how long its corpus is.
  """
  if config.tasks:
    return {"store_bytes_per_token": None, "tokens": None, "store_bytes": None}
  per_token = round(record_bytes_per_token(programs.planned_manifest(config)), 1)
  total = total_tokens(config, verb)
  # For a corpus of unknown length no more is known than what training sees, perhaps twice.
  stored = total_tokens(config, "record") or total
  return {
    "store_bytes_per_token": per_token,
    "tokens": total or None,
    "store_bytes": round(stored * per_token) if stored else None,
  }


def argument_bytes(config: Config, verb: str, mesh: jax.sharding.Mesh) -> int:
  """Bytes a device of parameters, optimiser and teacher on a mesh, without a compile."""
  if verb == "record":
    return _model_bytes(loading.open_source(config.teacher), mesh)
  teachers = state.online_teachers(config)
  teacher = sum(_model_bytes(source, mesh) for source in teachers.values())
  student = loading.open_source(config.student)
  trained = _placed_bytes(student.abstract_trainable, student.compute, mesh)
  width = jnp.dtype(config.student.param_dtype).itemsize
  base = _model_bytes(student, mesh) if student.trainable.has_base else 0
  moments = trained * (4 + width) / width  # the first in float32, the second as the weights
  return round(teacher + base + trained + moments)


def _model_bytes(source: ModelSource, mesh: jax.sharding.Mesh) -> int:
  return _placed_bytes(source.abstract, source.compute, mesh)


def _placed_bytes(tree: PyTree, compute: ComputeConfig, mesh: jax.sharding.Mesh) -> int:
  where = sharding.shardings(tree, mesh, compute.rules)
  return programs.bytes_of(sharding.with_shardings(tree, where))
