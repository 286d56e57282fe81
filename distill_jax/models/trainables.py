"""The trained parameters of a student, selected by `student.train`.

  whole      every parameter.
  frozen     every parameter except those whose names begin with a prefix in student.frozen.
  lora       low-rank adapters (student.lora) of a frozen base model.
  shared     layers that share weights (student.share), optionally as integers (student.quantise).
  quantised  every parameter, with linear weights as integers (student.quantise).

The trained parameters are a pytree: the model, its adapters, or its shared layers. Only the classes
in this module depend on which of these it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from distill_jax.errors import bad_value
from distill_jax.models.options import StudentOptions
from distill_jax.nn import grids, layer_sharing, lora, params, quantise, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import Model, PyTree


@dataclasses.dataclass(frozen=True)
class Trainable:
  """Training of every parameter ("whole"), and the base class of the other choices.

  Attributes:
    frozen: prefixes of Hugging Face names of parameters that are not updated.
    has_base: whether the model itself is not trained. It is then the argument `base` below.
    is_model: whether the trained parameters are the model in its family's ordinary form, apart from
      the rounding of weights.
  """

  frozen: tuple[str, ...] = ()
  has_base = False
  is_model = True

  def check(self, model: Model) -> None:
    """Checks that the options fit the student.

    Args:
      model: the student, or its shapes.

    Raises:
      InputError: they do not fit.
    """

  def init(self, model: Model, key: jax.Array, pretrained: bool) -> PyTree:
    """Returns the trained parameters before step 0.

    Args:
      model: the student. If `has_base`, its shapes are enough.
      key: PRNG key.
      pretrained: whether the student's weights are from a checkpoint, not random.

    Raises:
      InputError: the options do not fit the student.
    """
    del key, pretrained
    return model

  def start(
    self, model: Model, keys: Mapping[str, jax.Array], shardings: PyTree, pretrained: bool
  ) -> PyTree:
    """Returns the trained parameters before step 0 (`init`) on the mesh.

    Args:
      model: the student with its parameters.
      keys: the run's PRNG keys; see runs.keys.
      shardings: the shardings of the trained parameters.
      pretrained: as in `init`.
    """
    del keys, shardings, pretrained
    return model

  def model(self, trained: PyTree, base: Model | None = None) -> Model:
    """Returns the model for the training step, differentiable with respect to `trained`."""
    del base
    return trained

  def merge(self, trained: PyTree, base: Model | None, mesh: Mesh, compute: ComputeConfig) -> Model:
    """Returns the trained model in its family's ordinary form, on the mesh.

    `trained` and `base` may be donated.
    """
    del base, mesh, compute
    return trained


@dataclasses.dataclass(frozen=True)
class Frozen(Trainable):
  """Training of every parameter except some ("frozen").

  The training step differentiates with respect to the others only; see step.Step.
  """

  def check(self, model: Model) -> None:
    names = sorted({v.get_metadata()["hf"] for _, v in params.named_params(model)})
    if not self.frozen:
      expected = "at least one prefix because student.train is 'frozen'"
      action = "Set it, or student.train='whole'"
      raise bad_value("student.frozen", self.frozen, expected, action)
    for prefix in self.frozen:
      if not any(n.startswith(prefix) for n in names):
        expected = f"prefixes of the student's parameters {', '.join(names)}"
        raise bad_value("student.frozen", prefix, expected, "Correct the prefix")
    if all(n.startswith(self.frozen) for n in names):
      expected = f"prefixes that do not match all of the parameters {', '.join(names)}"
      raise bad_value("student.frozen", self.frozen, expected, "Remove a prefix")


@dataclasses.dataclass(frozen=True)
class Lora(Trainable):
  """Training of low-rank adapters of a frozen base model ("lora")."""

  options: lora.LoraOptions = lora.LoraOptions()
  has_base = True
  is_model = False

  def init(self, model: Model, key: jax.Array, pretrained: bool) -> PyTree:
    del pretrained
    return lora.init(model, self.options, key)

  def start(
    self, model: Model, keys: Mapping[str, jax.Array], shardings: PyTree, pretrained: bool
  ) -> PyTree:
    abstract = jax.eval_shape(lambda: model)
    init = functools.partial(self.init, abstract, pretrained=pretrained)
    return jax.jit(init, out_shardings=shardings)(keys["lora"])

  def model(self, trained: PyTree, base: Model | None = None) -> Model:
    assert base is not None
    return lora.with_adapters(base, trained)

  def merge(self, trained: PyTree, base: Model | None, mesh: Mesh, compute: ComputeConfig) -> Model:
    """Returns the base with its adapters merged; the base is donated."""
    shardings = sharding.shardings(base, mesh, compute.rules)
    return jax.jit(lora.merge_adapters, out_shardings=shardings, donate_argnums=0)(base, trained)


@dataclasses.dataclass(frozen=True)
class Quantised(Trainable):
  """Training of every parameter, with linear weights rounded to integers ("quantised")."""

  options: quantise.QuantiseOptions = quantise.QuantiseOptions()

  def check(self, model: Model) -> None:
    quantise.check(self.options, model)
    if not self.options.grid:
      expected = f"one of {', '.join(grids.GRIDS)} because student.train is 'quantised'"
      raise bad_value("student.quantise.grid", "", expected, "Choose one")

  def merge(self, trained: PyTree, base: Model | None, mesh: Mesh, compute: ComputeConfig) -> Model:
    """Returns the model with its linear weights rounded."""
    del base
    shardings = sharding.shardings(trained, mesh, compute.rules)
    rounded = jax.jit(
      quantise.tree, out_shardings=shardings, donate_argnums=0, static_argnames="spec"
    )
    return rounded(trained, spec=self.options)


@dataclasses.dataclass(frozen=True)
class LayerSharing(Trainable):
  """Training of layers that share weights, optionally with adapters per layer ("shared")."""

  options: layer_sharing.ShareOptions = layer_sharing.ShareOptions()
  integers: quantise.QuantiseOptions = quantise.QuantiseOptions()
  is_model = False

  def check(self, model: Model) -> None:
    quantise.check(self.integers, model)

  def init(self, model: Model, key: jax.Array, pretrained: bool) -> PyTree:
    return layer_sharing.start(model, self.options, key, pretrained)

  def start(
    self, model: Model, keys: Mapping[str, jax.Array], shardings: PyTree, pretrained: bool
  ) -> PyTree:
    init = functools.partial(self.init, pretrained=pretrained)
    key = jax.random.fold_in(keys["student"], 1)
    return jax.jit(init, out_shardings=shardings)(model, key=key)

  def model(self, trained: PyTree, base: Model | None = None) -> Model:
    del base
    return trained.with_adapters()

  def merge(self, trained: PyTree, base: Model | None, mesh: Mesh, compute: ComputeConfig) -> Model:
    model = self.unshare(trained, mesh, compute)
    if not self.integers.grid:
      return model
    return Quantised(options=self.integers).merge(model, base, mesh, compute)

  @staticmethod
  def unshare(trained: layer_sharing.SharedLayers, mesh: Mesh, compute: ComputeConfig) -> Model:
    """Returns the model with a separate copy of its weights for each layer."""
    abstract = jax.eval_shape(layer_sharing.SharedLayers.merge_adapters, trained)
    shardings = sharding.shardings(abstract, mesh, compute.rules)
    return jax.jit(layer_sharing.SharedLayers.merge_adapters, out_shardings=shardings)(trained)


WHOLE = Trainable()


def of_student(options: StudentOptions) -> Trainable:
  """Returns the Trainable for student.train."""
  match options.train:
    case "whole":
      return WHOLE
    case "frozen":
      return Frozen(options.frozen)
    case "lora":
      return Lora(options=options.lora)
    case "shared":
      return LayerSharing(options=options.share, integers=options.quantise)
    case "quantised":
      return Quantised(options=options.quantise)
  raise AssertionError(options.train)  # StudentOptions checks the values
