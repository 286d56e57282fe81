"""Checks of runs on a mesh with a context axis, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from distill_jax.data.options import DataOptions
from distill_jax.errors import bad_value
from distill_jax.models._decoder import Model as Decoder
from distill_jax.models.loading import ModelSource
from distill_jax.nn.sharding import SEQ


def positions(data: DataOptions) -> dict[str, int]:
  """Returns the argument `positions` of `check` for packed text."""
  return {f"the store {name}" if name else "data": n for n, name in data.folder_of_length.items()}


def check(
  mesh: Mesh, positions: Mapping[str, int], models: Sequence[ModelSource], of_tasks: bool
) -> None:
  """Checks that the positions of the data and models of a run can be spread over `context`.

  Args:
    mesh: the mesh.
    positions: the number of positions of a row, by the name of the data.
    models: the models that run.
    of_tasks: whether the data is that of tasks, not packed text.

  Raises:
    InputError: a row cannot be divided, or a model or task needs whole rows.
  """
  if (C := mesh.shape[SEQ]) == 1:
    return
  only = {"tasks, whose rows stay whole": of_tasks}
  for model in models:
    is_decoder = isinstance(model.abstract, Decoder)
    only[f"the family {model.family!r}, which is not a text decoder"] = not is_decoder
  for what, whole in only.items():
    if whole:
      raise bad_value("mesh.context", C, f"1 with {what}", "Set it to 1")
  for name, T in positions.items():
    if T % (2 * C):
      expected = f"a divisor of {T} / 2, where {T} is the number of positions in a row of {name}"
      raise bad_value("mesh.context", C, expected, "Change it, or data.seq_len")
