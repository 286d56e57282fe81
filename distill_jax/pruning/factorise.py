"""Low-rank approximation of matrices by their largest singular values."""

from __future__ import annotations

import math

import numpy as np
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.hub import declared
from distill_jax.models import DecoderModel
from distill_jax.nn import params
from distill_jax.runtime import distributed
from distill_jax.types import JsonObject


def targets(model: nnx.Module, ranks: dict[str, int]) -> dict[str, tuple[nnx.Variable, int]]:
  """Returns (matrix, rank) by path.

  Args:
    model: the model, or its shapes.
    ranks: ranks by the end of a matrix's dotted name.

  Raises:
    InputError: a name does not match a matrix of a layer, or a rank is not below the full rank.
  """
  matrices = {path: v for path, v in params.named_params(model) if _is_layer_matrix(v)}
  chosen: dict[str, tuple[nnx.Variable, int]] = {}
  for target, rank in ranks.items():
    matching = {p: v for p, v in matrices.items() if f".{_module(v)}".endswith(f".{target}")}
    if not matching:
      names = sorted({_module(v).rpartition(".")[2] for v in matrices.values()})
      expected = f"names among {', '.join(names)}"
      raise bad_value("shrink.factorise", target, expected, "Correct the name")
    for path, v in matching.items():
      full = min(declared.Layout(v).shape)
      if not 1 <= rank < full:
        expected = f"a rank from 1 to {full - 1} for {path}, whose full rank is {full}"
        raise bad_value(f"shrink.factorise.{target}", rank, expected, "Change the rank")
      chosen[path] = v, rank
  return chosen


def _is_layer_matrix(v: nnx.Variable) -> bool:
  return "layers" in v.get_metadata()["axes"] and bool(v.get_metadata()["out"])


def _module(v: nnx.Variable) -> str:
  """Returns the Hugging Face name of the module of a weight."""
  return v.get_metadata()["hf"].removesuffix(".weight")


def factorise(
  model: DecoderModel, ranks: dict[str, int], itemsize: int
) -> tuple[DecoderModel, JsonObject]:
  """Replaces matrices by their best low-rank approximations (Eckart-Young).

  The product of the factors keeps the matrix's shape, because transformers does not load factors.
  Memory is saved only by a student that starts from the factors (adapters or shared layers).

  Args:
    model: the model.
    ranks: ranks by the end of a matrix's dotted name.
    itemsize: bytes per element in the summary.

  Returns:
    (model, summary). The summary has for each path the rank, the full rank, the remaining fraction
    of the squared norm, bytes, and bytes as two factors.
  """
  values: JsonObject = {}
  summary: JsonObject = {}
  for path, (v, rank) in targets(model, ranks).items():
    x, layout = distributed.to_host(v[...]), declared.Layout(v)
    loops = x.ndim - len(layout.ours)
    new, kept, total = np.empty_like(x), 0.0, 0.0
    for at in np.ndindex(*x.shape[:loops]):
      matrix = layout.to_stored(x[at], np.dtype(np.float32))
      u, s, vt = np.linalg.svd(matrix, full_matrices=False)
      low = (u[:, :rank] * s[:rank]) @ vt[:rank]
      whole = (slice(None),) * len(layout.ours)
      layout.to_ours(low.astype(x.dtype), layout.cut(whole), new[at])
      kept, total = kept + float((s[:rank] ** 2).sum()), total + float((s**2).sum())
    values[path] = distributed.from_host(new, v[...].sharding)
    n = math.prod(x.shape[:loops])
    summary[path] = {
      "rank": rank,
      "of": min(layout.shape),
      "norm_kept": kept / total if total else 1.0,
      "bytes": n * math.prod(layout.shape) * itemsize,
      "bytes_as_factors": n * rank * sum(layout.shape) * itemsize,
    }
  return params.replace(model, values), summary
