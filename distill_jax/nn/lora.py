"""Low-rank adapters, trained while the model's own weights stay frozen (LoRA, arXiv:2106.09685).

A linear weight W is used as W + alpha / rank * A B. The sum is computed where a layer is used
(layers.ComputeConfig.cast_and_gather), one layer at a time, so that no second copy of the model
exists.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.tree_util import KeyPath

from distill_jax.errors import bad_value
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


PEFT = "base_model.model."  # the prefix of module names in PEFT checkpoints


class LoraAdapter(struct.PyTreeNode):
  """The adapter of one stacked weight, and in a model also that weight."""

  a: nnx.Variable  # [layers, input axes of the weight, rank]
  b: nnx.Variable  # [layers, rank, output axes of the weight]
  scale: float = struct.field(pytree_node=False)
  weight: nnx.Variable | None = None  # None outside a model

  def merged_weight(self) -> nnx.Variable:
    """Returns W + scale * A B in float32, for a stack or for one of its layers."""
    assert self.weight is not None, "with_adapters sets the weight"
    a_axes, b_axes, weight_axes = (v.get_metadata()["axes"] for v in (self.a, self.b, self.weight))
    number = {axis: i for i, axis in enumerate(dict.fromkeys(a_axes + b_axes), 1)}
    # A batch axis of size 1 (number 0): remat="dots" keeps products without a batch axis, and
    # those of all layers would be a second copy of the model.
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


Adapters = dict[str, LoraAdapter]  # by the path of the weight, e.g. "layers.q"


def init(model: Model, spec: LoraOptions, key: jax.Array, at: str = "student.lora") -> Adapters:
  """Initialises adapters in float32: A uniform as in PEFT, B zero.

  Args:
    model: the model, or its shapes.
    spec: the adapters.
    key: PRNG key.
    at: the config key of the spec, for errors.

  Raises:
    InputError: the spec does not fit the model; see `targets`.
  """
  weights = targets(model, spec, at)
  keys = jax.random.split(key, len(weights))
  return {path: _adapter(v, spec, k) for (path, v), k in zip(weights.items(), keys, strict=True)}


def _adapter(weight: nnx.Variable, spec: LoraOptions, key: jax.Array) -> LoraAdapter:
  """Initialises the adapter of one stacked weight."""
  meta, (inputs, outputs) = weight.get_metadata(), _linear_axes(weight)
  sizes, layers = dict(zip(meta["axes"], weight.shape, strict=True)), meta["axes"][0]
  input_dims, output_dims = (
    " ".join(f"{axis}:{sizes[axis]}" for axis in axes) for axes in (inputs, outputs)
  )
  module, rank = PEFT + _module(weight), f"rank:{spec.rank}"

  def of_layer(key: jax.Array) -> dict[str, nnx.Param]:
    a = param(key, f"{input_dims} {rank}", f"{module}.lora_A.weight", "rank", init="uniform")
    out = " ".join(outputs)
    b = param(key, f"{rank} {output_dims}", f"{module}.lora_B.weight", out, init="zeros")
    return {"a": a, "b": b}

  stacked = params.stack(sizes[layers], of_layer, key, axis=layers, first=meta["first"])
  return LoraAdapter(**stacked, scale=spec.alpha / spec.rank)


def targets(model: Model, spec: LoraOptions, at: str = "student.lora") -> dict[str, nnx.Variable]:
  """Returns the weights that get an adapter, by path, in the model's order.

  A target matches the end of a module's dotted name, like PEFT's target_modules.

  Args:
    model: the model, or its shapes.
    spec: the adapters.
    at: the config key of the spec, for errors.

  Raises:
    InputError: a number is out of range, a target is not a linear layer of the model or has the
      name of an expert's layer, or the rank is larger than a weight.
  """
  _check_options(spec, at)
  linear = {path: v for path, v in params.named_params(model) if _is_linear(v)}
  # PEFT treats every layer with the name of an expert's layer as an expert, shared experts too.
  expert_names = {_last_name(v) for v in linear.values() if _is_routed(v)}
  names = ", ".join(sorted({_last_name(v) for v in linear.values()} - expert_names))
  chosen: set[str] = set()
  for target in spec.targets:
    found = {p: v for p, v in linear.items() if f".{_module(v)}".endswith(f".{target}")}
    if not found:
      raise bad_value(f"{at}.targets", target, f"modules among {names}", "Change the name")
    if target.rpartition(".")[2] in expert_names:
      expected = f"modules among {names}, because layers of experts cannot have adapters"
      raise bad_value(f"{at}.targets", target, expected, "Change the name")
    for path, v in found.items():
      _check_rank(path, v, spec.rank, at)
    chosen |= set(found)
  return {path: v for path, v in linear.items() if path in chosen}


def _check_options(spec: LoraOptions, at: str) -> None:
  if spec.rank < 1:
    action = "Set a rank, or student.train='whole' to train without adapters"
    raise bad_value(f"{at}.rank", spec.rank, "at least 1", action)
  if not 0 < spec.alpha < math.inf:
    raise bad_value(f"{at}.alpha", spec.alpha, "a positive number", "Change it")
  if not spec.targets or len(set(spec.targets)) < len(spec.targets):
    raise bad_value(f"{at}.targets", spec.targets, "distinct module names", "Change the list")


def _check_rank(path: str, weight: nnx.Variable, rank: int, at: str) -> None:
  sizes = dict(zip(weight.get_metadata()["axes"], weight.shape, strict=True))
  inputs, outputs = (math.prod(sizes[axis] for axis in axes) for axes in _linear_axes(weight))
  if rank > min(inputs, outputs):
    expected = f"at most {min(inputs, outputs)} because {path} is {inputs} by {outputs}"
    raise bad_value(f"{at}.rank", rank, expected, "Lower the rank")


def _linear_axes(weight: nnx.Variable) -> tuple[list[str], tuple[str, ...]]:
  """Returns the (input, output) axes of a linear weight, without the layers."""
  meta = weight.get_metadata()
  return [a for a in meta["axes"] if a not in (*params.LAYERS, *meta["out"])], meta["out"]


def _module(weight: nnx.Variable) -> str:
  """Returns the dotted Hugging Face name of the linear layer."""
  return weight.get_metadata()["hf"].removesuffix(".weight")


def _last_name(weight: nnx.Variable) -> str:
  """Returns the last part of the linear layer's name, e.g. "q_proj"."""
  return _module(weight).rpartition(".")[2]


def _is_linear(v: nnx.Variable) -> bool:
  axes, out = v.get_metadata()["axes"], v.get_metadata()["out"]
  return bool(out) and not set(params.LAYERS).isdisjoint(axes)


def _is_routed(v: nnx.Variable) -> bool:
  return bool({"experts", "routes"} & set(v.get_metadata()["axes"]))


def with_adapters(model: Tree, adapters: Adapters) -> Tree:
  """Returns the model with its adapters in it; its outputs are those of the adapted model."""

  def attach(path: KeyPath, v: nnx.Variable) -> LoraAdapter | nnx.Variable:
    adapter = adapters.get(params.dotted(path))
    return v if adapter is None else adapter.replace(weight=v)

  return jax.tree_util.tree_map_with_path(attach, model, is_leaf=params.is_param)


def merge_attached(tree: Tree) -> Tree:
  """Merges every adapter in a tree (see `with_adapters`) into its weight, as float32."""
  return jax.tree.map(
    lambda x: x.merged_weight() if isinstance(x, LoraAdapter) else x,
    tree,
    is_leaf=lambda x: isinstance(x, LoraAdapter) or params.is_param(x),
  )


def merge_adapters(model: Tree, adapters: Adapters) -> Tree:
  """Returns the model with its adapters merged, each weight in its original dtype."""
  merged = merge_attached(with_adapters(model, adapters))
  return params.map_params(lambda v, was: v.replace(v[...].astype(was.dtype)), merged, model)
