"""Experts that are dropped go into those that are kept.

An expert computes the same whatever the order of its channels, so each is brought into the
order in which it is most like the one that it joins before their mean is taken, by how much
each was used (arXiv:2310.01334).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from distill_jax.nn import params
from distill_jax.pruning.cut import Kept, Measured
from distill_jax.runtime import distributed

WEIGHTS = ("gate", "up", "down")


def merge(model: Any, kept: Kept, measured: Measured) -> Any:
  """The teacher, the experts that are kept now the means of those that join them.

  The router still tells all experts apart; the kept ones' columns stay as they are.
  """
  model = params.map_params(lambda v: v, model)  # a copy of the tree, not of its arrays
  for stack, places in kept.places.items():
    if "experts" not in places:
      continue
    experts = getattr(model, stack).experts
    router_LDE = distributed.to_host(experts.router[...])
    weights = {name: np.array(distributed.to_host(getattr(experts, name)[...])) for name in WEIGHTS}
    # A layer that the student has twice is merged once.
    for row, chosen_E in dict(zip(kept.rows[stack], places["experts"], strict=True)).items():
      layer = {name: w[row] for name, w in weights.items()}  # views, which are filled
      _merge_layer(layer, router_LDE[row], chosen_E, measured[stack]["experts"][row])
    for name, w in weights.items():
      v = getattr(experts, name)
      setattr(experts, name, v.replace(distributed.from_host(w, v[...].sharding)))
  return model


def _merge_layer(
  layer: dict[str, np.ndarray], router_DE: np.ndarray, chosen_E: np.ndarray, used_E: np.ndarray
) -> None:
  """Fills the kept experts of one layer, [E, D, F] and [E, F, D], with the means."""
  unit_DE = router_DE / np.maximum(np.linalg.norm(router_DE, axis=0), 1e-30)
  likeness_Ee = unit_DE.T @ unit_DE[:, chosen_E]
  joins_E = chosen_E[likeness_Ee.argmax(1)]
  joins_E[chosen_E] = chosen_E
  used_E = used_E / used_E.sum()
  for into in chosen_E:
    group = [int(e) for e in np.flatnonzero(joins_E == into) if e == into or used_E[e] > 0]
    if len(group) == 1 or used_E[into] == 0:
      continue
    share = used_E[group] / used_E[group].sum()
    order = {e: align(layer, e, into) for e in group if e != into}
    for name, w in layer.items():
      axis = 0 if name == "down" else 1
      mean = np.zeros(w.shape[1:], np.float32)
      for a, e in zip(share, group, strict=True):
        mean += a * (w[e] if e == into else np.take(w[e], order[e], axis)).astype(np.float32)
      w[into] = mean


def align(layer: dict[str, np.ndarray], e: int, into: int) -> np.ndarray:
  """The order of expert e's channels, [F], in which its weights are most like another's."""
  f32 = lambda name, i: np.asarray(layer[name][i], np.float32)
  likeness_FF = sum(f32(name, into).T @ f32(name, e) for name in ("gate", "up"))
  likeness_FF = likeness_FF + f32("down", into) @ f32("down", e).T
  return linear_sum_assignment(likeness_FF, maximize=True)[1]
