"""Low-rank adapters, trained in a frozen model's place (LoRA, arXiv:2106.09685).

A linear weight W is used as W + alpha / rank * A B. The sum is made where a layer is used
(layers.ComputeConfig.cast_and_gather), a layer at a time, so no second copy of the model exists.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.tree_util import KeyPath

from distill_jax.errors import InputError
from distill_jax.nn import params
from distill_jax.nn.params import param
from distill_jax.types import Model, Tree


@dataclasses.dataclass(frozen=True)
class LoraOptions:
  """Low-rank adapters, trained instead of the model's own weights."""

  rank: int = 0
  """Rank of each adapter: at least 1 for student.train="lora". In `student.share`, 0 means that
  layers have no adapters."""
  alpha: float = 16.0
  """Scale of the adapters: a weight W is used as W + alpha / rank * A B."""
  targets: tuple[str, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
  )
  """Linear layers that get an adapter: Hugging Face module names or the ends of dotted names, e.g.
  "q_proj" or "self_attn.q_proj"."""


PEFT = "base_model.model."  # what PEFT puts before a module's name


class LoraAdapter(struct.PyTreeNode):
  """What is trained of one stacked weight, with that weight where it is in a model."""

  a: nnx.Variable  # [layers, the weight's input axes, rank]
  b: nnx.Variable  # [layers, rank, the weight's output axes]
  scale: float = struct.field(pytree_node=False)
  weight: nnx.Variable | None = None  # None outside a model

  def merged_weight(self) -> nnx.Variable:
    """The weight that they make together, float32, of a stack or of one of its layers."""
    assert self.weight is not None, "with_adapters puts an adapter beside its weight"
    a_axes, b_axes, weight_axes = (v.get_metadata()["axes"] for v in (self.a, self.b, self.weight))
    number = {axis: i for i, axis in enumerate(dict.fromkeys(a_axes + b_axes), 1)}
    # A batch axis of size 1 (number 0): products without one are kept by remat="dots",
    # and these, of all layers, would be a second copy of the model.
    a_numbers, b_numbers, weight_numbers = (
      [0, *(number[axis] for axis in axes)] for axes in (a_axes, b_axes, weight_axes)
    )
    ab = jnp.einsum(
      self.a[...][None],
      a_numbers,
      self.b[...][None],
      b_numbers,
      weight_numbers,
      precision="highest",
      preferred_element_type=jnp.float32,
    )
    return self.weight.replace(self.weight[...].astype(jnp.float32) + self.scale * ab[0])


Adapters = dict[str, LoraAdapter]  # by the path of the weight, as "layers.q"


def init(model: Model, spec: LoraOptions, key: jax.Array, at: str = "student.lora") -> Adapters:
  """Adapters for a model (or its shapes), float32: A as PEFT draws it, B zero.

  `at` is where the spec stands in the config.

  Raises:
    InputError: the spec does not fit the model; see `targets`.
  """
  weights = targets(model, spec, at)
  keys = jax.random.split(key, len(weights))
  return {path: _adapter(v, spec, k) for (path, v), k in zip(weights.items(), keys, strict=True)}


def _adapter(weight: nnx.Variable, spec: LoraOptions, key: jax.Array) -> LoraAdapter:
  """One weight's adapter, for all its layers."""
  meta, (inputs, outputs) = weight.get_metadata(), _linear_axes(weight)
  sizes = dict(zip(meta["axes"], weight.shape, strict=True))
  input_dims, output_dims = (
    " ".join(f"{axis}:{sizes[axis]}" for axis in axes) for axes in (inputs, outputs)
  )
  module, rank = PEFT + _module(weight), f"rank:{spec.rank}"

  def of_layer(key: jax.Array) -> dict[str, nnx.Param]:
    a = param(key, f"{input_dims} {rank}", f"{module}.lora_A.weight", "rank", init="uniform")
    out = " ".join(outputs)
    b = param(key, f"{rank} {output_dims}", f"{module}.lora_B.weight", out, init="zeros")
    return {"a": a, "b": b}

  stacked = params.stack(sizes["layers"], of_layer, key, first=meta["first"])
  return LoraAdapter(**stacked, scale=spec.alpha / spec.rank)


def targets(model: Model, spec: LoraOptions, at: str = "student.lora") -> dict[str, nnx.Variable]:
  """The weights that are adapted, by path, in the order in which the model has them.

  A target names modules as PEFT's target_modules do: by the end of their dotted name.

  Raises:
    InputError: a number out of range; a target that is no linear layer of the model, or is named
      as experts are; a rank larger than a weight.
  """
  _check_options(spec, at)
  linear = {path: v for path, v in params.named_params(model) if _is_linear(v)}
  # PEFT takes every layer that is called as experts' are, the shared ones too, for theirs.
  expert_names = {_last_name(v) for v in linear.values() if _is_routed(v)}
  names = ", ".join(sorted({_last_name(v) for v in linear.values()} - expert_names))
  chosen: set[str] = set()
  for target in spec.targets:
    found = {p: v for p, v in linear.items() if f".{_module(v)}".endswith(f".{target}")}
    if not found:
      raise InputError(
        f"{at}.targets names {target!r} and the student has {names}; name some of these"
      )
    if target.rpartition(".")[2] in expert_names:
      raise InputError(
        f"{at}.targets names {target!r}, which in the student are experts, and adapters go "
        f"on layers that all tokens pass; name some of {names}"
      )
    for path, v in found.items():
      _check_rank(path, v, spec.rank, at)
    chosen |= set(found)
  return {path: v for path, v in linear.items() if path in chosen}


def _check_options(spec: LoraOptions, at: str) -> None:
  if spec.rank < 1 or not 0 < spec.alpha < math.inf:
    raise InputError(
      f"{at} has rank {spec.rank} and alpha {spec.alpha:g}; the rank is at least 1 and "
      "alpha a positive number; for no adapters set student.train='whole'"
    )
  if not spec.targets or len(set(spec.targets)) < len(spec.targets):
    raise InputError(f"{at}.targets is {spec.targets}; name modules, each once")


def _check_rank(path: str, weight: nnx.Variable, rank: int, at: str) -> None:
  sizes = dict(zip(weight.get_metadata()["axes"], weight.shape, strict=True))
  inputs, outputs = (math.prod(sizes[axis] for axis in axes) for axes in _linear_axes(weight))
  if rank > min(inputs, outputs):
    raise InputError(
      f"{at}.rank is {rank} and {path} is {inputs} by {outputs}; the rank is at most "
      f"{min(inputs, outputs)}"
    )


def _linear_axes(weight: nnx.Variable) -> tuple[list[str], tuple[str, ...]]:
  """The names of a layer's (input, output) axes."""
  meta = weight.get_metadata()
  return [a for a in meta["axes"] if a not in ("layers", *meta["out"])], meta["out"]


def _module(weight: nnx.Variable) -> str:
  """Hugging Face's name of the linear layer, dotted."""
  return weight.get_metadata()["hf"].removesuffix(".weight")


def _last_name(weight: nnx.Variable) -> str:
  """The end of that name, as "q_proj"."""
  return _module(weight).rpartition(".")[2]


def _is_linear(v: nnx.Variable) -> bool:
  return "layers" in v.get_metadata()["axes"] and bool(v.get_metadata()["out"])


def _is_routed(v: nnx.Variable) -> bool:
  return bool({"experts", "routes"} & set(v.get_metadata()["axes"]))


def with_adapters(model: Tree, adapters: Adapters) -> Tree:
  """Returns the model with its adapters in it: computed as the model that they make."""

  def beside_weight(path: KeyPath, v: nnx.Variable) -> LoraAdapter | nnx.Variable:
    adapter = adapters.get(params.dotted(path))
    return v if adapter is None else adapter.replace(weight=v)

  return jax.tree_util.tree_map_with_path(beside_weight, model, is_leaf=params.is_param)


def merge_attached(tree: Tree) -> Tree:
  """Merges every adapter in a tree (see with_adapters) into its weight, which becomes float32."""
  return jax.tree.map(
    lambda x: x.merged_weight() if isinstance(x, LoraAdapter) else x,
    tree,
    is_leaf=lambda x: isinstance(x, LoraAdapter) or params.is_param(x),
  )


def merge_adapters(model: Tree, adapters: Adapters) -> Tree:
  """Returns the model that they make, each weight rounded to the dtype that it had."""
  merged = merge_attached(with_adapters(model, adapters))
  return params.map_params(lambda v, was: v.replace(v[...].astype(was.dtype)), merged, model)
