"""What of a student is trained: one choice, `student.train`, and what follows from it.

  whole      every parameter.
  frozen     every parameter but those whose names begin with one of student.frozen.
  lora       low-rank adapters (student.lora) of a base model that stays as it is.
  shared     layers that share weights (student.share), perhaps as integers (student.quantise).
  quantised  every parameter, linear weights as integers (student.quantise).

What is trained is a pytree of parameters: the model, its adapters, or its shared layers. Only the
classes here know which.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from distill_jax.errors import InputError
from distill_jax.models.options import StudentOptions
from distill_jax.nn import layer_sharing, lora, params, quantise, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import Model, PyTree


@dataclasses.dataclass(frozen=True)
class Trainable:
  """Every parameter of the model is trained: "whole".

  Attributes:
    frozen: beginnings of Hugging Face names of parameters that have no update.
    has_base: the model itself is not trained, and everything below takes it as `base`.
  """

  frozen: tuple[str, ...] = ()
  has_base = False

  def check(self, model: Model) -> None:
    """Refuses options that do not fit the student.

    Args:
      model: the student, or its shapes.

    Raises:
      InputError: they do not fit.
    """

  def init(self, model: Model, key: jax.Array, pretrained: bool) -> PyTree:
    """What is trained, as it is before step 0.

    Args:
      model: the student; its shapes are enough if it has a base.
      pretrained: its weights are not random.

    Raises:
      InputError: the options do not fit the student.
    """
    del key, pretrained
    return model

  def start(
    self, model: Model, keys: Mapping[str, jax.Array], shardings: PyTree, pretrained: bool
  ) -> PyTree:
    """`init` on the mesh: what training starts from.

    Args:
      model: the student with its parameters.
      keys: the run's; see runs.keys.
      shardings: of what is trained.
    """
    del keys, shardings, pretrained
    return model

  def model(self, trained: PyTree, base: Model | None = None) -> Model:
    """The model as the training step computes it, differentiable in what is trained."""
    del base
    return trained

  def merge(self, trained: PyTree, base: Model | None, mesh: Mesh, compute: ComputeConfig) -> Model:
    """The trained model in its family's ordinary form, on the mesh; `trained` may be donated."""
    del base, mesh, compute
    return trained


@dataclasses.dataclass(frozen=True)
class Frozen(Trainable):
  """Every parameter but some is trained."""

  def check(self, model: Model) -> None:
    names = sorted({v.get_metadata()["hf"] for _, v in params.named_params(model)})
    if not self.frozen:
      raise InputError("student.train is 'frozen' and student.frozen names no parameter")
    lost = [start for start in self.frozen if not any(n.startswith(start) for n in names)]
    if lost or all(n.startswith(self.frozen) for n in names):
      which = f"{lost[0]!r}, with which no" if lost else f"{self.frozen}, with which every"
      raise InputError(
        f"student.frozen names {which} parameter of the student begins; they are called "
        f"{', '.join(names)}"
      )

  def model(self, trained: PyTree, base: Model | None = None) -> Model:
    del base

    def leaf(x: jax.Array, trainable: bool) -> jax.Array:
      return x if trainable else jax.lax.stop_gradient(x)

    return jax.tree.map(leaf, trained, params.trainable_mask(trained, self.frozen))


@dataclasses.dataclass(frozen=True)
class Lora(Trainable):
  """Low-rank adapters are trained, beside a base model that stays as it is."""

  options: lora.LoraOptions = lora.LoraOptions()
  has_base = True

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
    """The base with its adapters merged; the base is donated."""
    shardings = sharding.shardings(base, mesh, compute.rules)
    return jax.jit(lora.merge_adapters, out_shardings=shardings, donate_argnums=0)(base, trained)


@dataclasses.dataclass(frozen=True)
class Quantised(Trainable):
  """Every parameter is trained, linear weights as the integers that they are used as."""

  options: quantise.QuantiseOptions = quantise.QuantiseOptions()

  def check(self, model: Model) -> None:
    quantise.check(self.options, model)
    if not self.options.bits:
      raise InputError("student.train is 'quantised' and student.quantise.bits is 0; set 4 or 8")

  def merge(self, trained: PyTree, base: Model | None, mesh: Mesh, compute: ComputeConfig) -> Model:
    """The model with its weights rounded to their grids."""
    del base
    round_to_grid = functools.partial(quantise.tree, spec=self.options)
    shardings = sharding.shardings(trained, mesh, compute.rules)
    return jax.jit(round_to_grid, out_shardings=shardings, donate_argnums=0)(trained)


@dataclasses.dataclass(frozen=True)
class LayerSharing(Trainable):
  """Layers that share weights are trained, each perhaps with a low-rank difference of its own."""

  options: layer_sharing.ShareOptions = layer_sharing.ShareOptions()
  integers: quantise.QuantiseOptions = quantise.QuantiseOptions()

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
    if not self.integers.bits:
      return model
    return Quantised(options=self.integers).merge(model, base, mesh, compute)

  @staticmethod
  def unshare(trained: layer_sharing.SharedLayers, mesh: Mesh, compute: ComputeConfig) -> Model:
    """The model with a copy of the shared layers wherever they are used."""
    abstract = jax.eval_shape(layer_sharing.SharedLayers.merge_adapters, trained)
    shardings = sharding.shardings(abstract, mesh, compute.rules)
    return jax.jit(layer_sharing.SharedLayers.merge_adapters, out_shardings=shardings)(trained)


WHOLE = Trainable()


def of_student(options: StudentOptions) -> Trainable:
  """What student.train selects."""
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
  raise AssertionError(options.train)  # StudentOptions refuses others
