"""Which layers, heads, channels and experts a student keeps, from what was measured.

Layers of SmolLM2-135M, held-out cross-entropy before any training (all 30: 3.08 nats):

  kept                         24     20     16     12
  even                       5.37   9.55  14.11  14.88
  ends                       3.83   6.58   8.01   9.43
  influence                  3.85   4.67   6.35  13.18
  loss, each tried once      3.98   4.72   5.77   7.80
  loss, anew in six rounds   3.87                 6.55
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

LossWithout = Callable[[Sequence[int]], float]  # given the layers that are left out


def even(n: int, layers: int) -> tuple[int, ...]:
  """n layers at equal steps from the first to the last; some twice where n is more."""
  return tuple(int(round(x)) for x in np.linspace(0, layers - 1, n))


def ends(n: int, layers: int) -> tuple[int, ...]:
  """n layers, half of them the first, half the last."""
  first = (n + 1) // 2
  return (*range(first), *range(layers - (n - first), layers))


def influential(n: int, influence_L: np.ndarray) -> tuple[int, ...]:
  """The n layers that turn the residual most."""
  return tuple(int(i) for i in top_indices(influence_L, n))


def removal_order(layers: int, loss_without: LossWithout) -> Iterator[int]:
  """Yields layers in the order in which they can go: those without which the loss is least.

  Each is tried anew once others have gone; a tenth of those that are left go at once. With
  SmolLM2, to 12 of 30 layers, that is 150 losses and not 378, and for the first three the same.
  """
  kept = list(range(layers))
  while kept:
    gone = [i for i in range(layers) if i not in kept]
    losses = {i: loss_without([*gone, i]) for i in kept}
    for i in sorted(kept, key=losses.__getitem__)[: max(1, len(kept) // 10)]:
      kept.remove(i)
      yield i


def top_indices(score: np.ndarray, k: int) -> np.ndarray:
  """The indices of the k largest along the last axis, in rising order."""
  return np.sort(np.argsort(-score, axis=-1, kind="stable")[..., :k], axis=-1)


def heads(
  score_LH: np.ndarray, groups: int, new_heads: int, new_groups: int, merge: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  """Chooses query heads and key/value heads; a group's query heads keep reading its keys.

  Args:
    groups: key/value heads of the teacher, each read by equally many query heads.
    new_heads, new_groups: how many of each the student has.
    merge: whether neighbouring groups are joined, not dropped.

  Returns: query heads [L, H'] and key/value heads [L, G'], in their order; the second is None
    where groups are merged.
  """
  L = len(score_LH)
  score_LGQ = score_LH.reshape(L, new_groups if merge else groups, -1)
  heads_per_group = score_LGQ.shape[-1]
  kept_LG = np.broadcast_to(np.arange(new_groups), (L, new_groups))
  if not merge:
    kept_LG = top_indices((score_LGQ**2).sum(-1), new_groups)
  within_LGQ = top_indices(score_LGQ, new_heads // new_groups)  # of every group
  within_LGQ = np.take_along_axis(within_LGQ, kept_LG[..., None], 1)
  heads_LH = (kept_LG[..., None] * heads_per_group + within_LGQ).reshape(L, -1)
  return heads_LH, None if merge else kept_LG


def experts(score_LE: np.ndarray, k: int, groups: int) -> np.ndarray:
  """The k most used experts, equally many of each group that the router knows: [L, k]."""
  score = score_LE.reshape(len(score_LE), groups, -1)
  first = np.arange(groups)[None, :, None] * score.shape[-1]
  return (top_indices(score, k // groups) + first).reshape(len(score_LE), -1)
