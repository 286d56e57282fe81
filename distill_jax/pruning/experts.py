"""Merges removed experts into the kept ones (arXiv:2310.01334).

The order of an expert's channels does not change its output. So the channels of a removed expert
are first reordered to be as similar as possible to those of its kept expert. Then the experts are
averaged, weighted by their use.
"""

from __future__ import annotations

import numpy as np

from distill_jax.models import DecoderModel
from distill_jax.nn import params
from distill_jax.pruning.cut import KeptIndices
from distill_jax.pruning.measure import Importance
from distill_jax.runtime import distributed

WEIGHTS = ("gate", "up", "down")


def merge(model: DecoderModel, kept: KeptIndices, measured: Importance) -> DecoderModel:
  """Returns the teacher with its kept experts replaced by averages with the removed ones.

  The router is unchanged and still has all experts.

  Args:
    model: the teacher.
    kept: the kept indices.
    measured: the importance of the teacher's parts.
  """
  model = params.map_params(lambda v: v, model)  # copies the tree, not its arrays
  for stack, indices in kept.axes.items():
    if "experts" not in indices:
      continue
    experts = getattr(model, stack).experts
    router_LDE = distributed.to_host(experts.router[...])
    weights = {name: np.array(distributed.to_host(getattr(experts, name)[...])) for name in WEIGHTS}
    # A layer that the student repeats is merged only once.
    for row, chosen_E in dict(zip(kept.rows[stack], indices["experts"], strict=True)).items():
      layer = {name: w[row] for name, w in weights.items()}  # views, written in place
      _merge_layer(layer, router_LDE[row], chosen_E, measured[stack]["experts"][row])
    for name, w in weights.items():
      v = getattr(experts, name)
      setattr(experts, name, v.replace(distributed.from_host(w, v[...].sharding)))
  return model


def _merge_layer(
  layer: dict[str, np.ndarray], router_DE: np.ndarray, chosen_E: np.ndarray, used_E: np.ndarray
) -> None:
  """Overwrites the kept experts of one layer, [E, D, F] and [E, F, D], with averages."""
  unit_DE = router_DE / np.maximum(np.linalg.norm(router_DE, axis=0), 1e-30)
  similarity_EE = unit_DE.T @ unit_DE[:, chosen_E]
  joins_E = chosen_E[similarity_EE.argmax(1)]
  joins_E[chosen_E] = chosen_E
  used_E = used_E / used_E.sum()
  for into in chosen_E:
    group = [int(e) for e in np.flatnonzero(joins_E == into) if e == into or used_E[e] > 0]
    if len(group) == 1 or used_E[into] == 0:
      continue
    fractions = used_E[group] / used_E[group].sum()
    order = {e: align(layer, e, into) for e in group if e != into}
    for name, w in layer.items():
      axis = 0 if name == "down" else 1
      mean = np.zeros(w.shape[1:], np.float32)
      for fraction, e in zip(fractions, group, strict=True):
        ordered = w[e] if e == into else np.take(w[e], order[e], axis)
        mean += fraction * ordered.astype(np.float32)
      w[into] = mean


def align(layer: dict[str, np.ndarray], e: int, into: int) -> np.ndarray:
  """Returns the order [F] of expert e's channels that is most similar to expert `into`."""
  from scipy.optimize import linear_sum_assignment  # its import takes 0.4 s

  ours = {name: np.asarray(w[e], np.float32) for name, w in layer.items()}
  theirs = {name: np.asarray(w[into], np.float32) for name, w in layer.items()}
  similarity_FF = sum(theirs[name].T @ ours[name] for name in ("gate", "up"))
  similarity_FF = similarity_FF + theirs["down"] @ ours["down"].T
  return linear_sum_assignment(similarity_FF, maximize=True)[1]
