"""A copy of the student in training from which texts are sampled.

The next step updates the weights of the training state, and decoding has another form of them, into
which it converts the copy piece by piece. A step has a gradient in the place of the copy, and
activations in that of the KV cache; with low-rank adapters, whose base has no gradient, the copy of
the base comes on top.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.models.loading import LoadedModel, ModelSource
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.types import Model, PyTree


def decoding_copy(
  source: ModelSource, trained: PyTree, base: Model | None, mesh: Mesh
) -> LoadedModel:
  """Returns a copy of the trained model in its family's ordinary form.

  Args:
    source: The student.
    trained: The trained parameters.
    base: The base model of low-rank adapters, or None.
    mesh: The mesh.
  """
  compute = dataclasses.replace(source.compute, quantise=QuantiseOptions())  # already rounded
  trained, base = jax.tree.map(jnp.copy, (trained, base))
  model = source.trainable.merge(trained, base, mesh, compute)
  return LoadedModel(model, source.config, compute, source.pretrained)
