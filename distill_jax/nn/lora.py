"""Low-rank adapters, trained in a frozen model's place (LoRA, arXiv:2106.09685).

A linear weight W is used as W + alpha / rank * A B. The sum is made where a layer is used
(layers.Compute.view), a layer at a time, so no second copy of the model exists.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.errors import InputError
from distill_jax.nn import params
from distill_jax.nn.params import param


@dataclasses.dataclass(frozen=True)
class LoraOptions:
  """Low-rank adapters, trained in the place of the model's own weights."""

  rank: int = 0  # 0: none, and all weights are trained
  alpha: float = 16.0  # a weight W is used as W + alpha / rank * A B
  targets: tuple[str, ...] = (  # Hugging Face's names of linear layers, or ends of dotted ones
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
  )


PEFT = "base_model.model."  # what PEFT puts before a module's name


class Adapter(struct.PyTreeNode):
  """What is trained of one stacked weight, beside that weight where the two are joined."""

  a: Any  # an nnx.Param [layers, the weight's input axes, rank]
  b: Any  # an nnx.Param [layers, rank, the weight's output axes]
  scale: float = struct.field(pytree_node=False)
  weight: Any = None

  def merged_weight(self) -> Any:
    """The weight that they make together, float32, of a stack or of one of its layers."""
    names = lambda v: v.get_metadata()["axes"]
    number = {name: i for i, name in enumerate(dict.fromkeys(names(self.a) + names(self.b)), 1)}
    # A batch axis of size 1 (number 0): products without one are kept by remat="dots",
    # and these, of all layers, would be a second copy of the model.
    of = lambda v: (v[...][None], [0, *(number[n] for n in names(v))])
    out = [0, *(number[n] for n in names(self.weight))]
    ab = jnp.einsum(
      *of(self.a), *of(self.b), out, precision="highest", preferred_element_type=jnp.float32
    )
    return self.weight.replace(self.weight[...].astype(jnp.float32) + self.scale * ab[0])


Adapters = dict[str, Adapter]  # by the path of the weight, as "layers.q"


def init(model: Any, spec: LoraOptions, key: jax.Array, at: str = "student.lora") -> Adapters:
  """Adapters for a model (or its shapes), float32: A as PEFT draws it, B zero.

  `at` is where the spec stands in the config.

  Raises:
    InputError: the spec does not fit the model; see `targets`.
  """
  weights = targets(model, spec, at)
  keys = jax.random.split(key, len(weights))
  return {path: _adapter(v, spec, k) for (path, v), k in zip(weights.items(), keys, strict=True)}


def _adapter(weight: Any, spec: LoraOptions, key: jax.Array) -> Adapter:
  meta, (inner, outer) = weight.get_metadata(), _axes(weight)
  sizes = dict(zip(meta["axes"], weight.shape, strict=True))
  dims = lambda axes: " ".join(f"{name}:{sizes[name]}" for name in axes)
  module, r = PEFT + _module(weight), spec.rank
  a = f"{dims(inner)} rank:{r}", f"{module}.lora_A.weight", "rank"
  b = f"rank:{r} {dims(outer)}", f"{module}.lora_B.weight", " ".join(outer)
  pair = lambda key: {"a": param(key, *a, init="uniform"), "b": param(key, *b, init="zeros")}
  stacked = params.stack(sizes["layers"], pair, key, first=meta["first"])
  return Adapter(**stacked, scale=spec.alpha / r)


def targets(model: Any, spec: LoraOptions, at: str = "student.lora") -> dict[str, Any]:
  """The weights that are adapted, by path.

  A target names modules as PEFT's target_modules do: by the end of their dotted name.

  Raises:
    InputError: a number out of range; a target that is no linear layer of the model, or is named
      as experts are; a rank larger than a weight.
  """
  if spec.rank < 1 or not 0 < spec.alpha < math.inf:
    raise InputError(
      f"{at} has rank {spec.rank} and alpha {spec.alpha:g}; the rank is at least 1 (0 for "
      "no adapters) and alpha a positive number"
    )
  if not spec.targets or len(set(spec.targets)) < len(spec.targets):
    raise InputError(f"{at}.targets is {spec.targets}; name modules, each once")
  linear = {path: v for path, v in params.named_params(model) if _is_linear(v)}
  name = lambda v: _module(v).rpartition(".")[2]
  # PEFT takes every layer that is called as experts' are, the shared ones too, for theirs.
  experts = {name(v) for v in linear.values() if _is_routed(v)}
  names = ", ".join(sorted({name(v) for v in linear.values()} - experts))
  chosen: dict[str, Any] = {}
  for target in spec.targets:
    found = {p: v for p, v in linear.items() if f".{_module(v)}".endswith(f".{target}")}
    if not found:
      raise InputError(
        f"{at}.targets names {target!r} and the student has {names}; name some of these"
      )
    if target.rpartition(".")[2] in experts:
      raise InputError(
        f"{at}.targets names {target!r}, which in the student are experts, and adapters go "
        f"on layers that all tokens pass; name some of {names}"
      )
    for path, v in found.items():
      _check_rank(path, v, spec.rank, at)
    chosen |= found
  return {path: v for path, v in linear.items() if path in chosen}


def _check_rank(path: str, weight: Any, rank: int, at: str) -> None:
  sizes = dict(zip(weight.get_metadata()["axes"], weight.shape, strict=True))
  inner, outer = (math.prod(sizes[name] for name in axes) for axes in _axes(weight))
  if rank > min(inner, outer):
    raise InputError(
      f"{at}.rank is {rank} and {path} is {inner} by {outer}; the rank is at most "
      f"{min(inner, outer)}"
    )


def _axes(weight: Any) -> tuple[list[str], tuple[str, ...]]:
  """The names of a layer's (input, output) axes."""
  meta = weight.get_metadata()
  return [a for a in meta["axes"] if a not in ("layers", *meta["out"])], meta["out"]


def _module(weight: Any) -> str:
  return weight.get_metadata()["hf"].removesuffix(".weight")


def _is_linear(v: Any) -> bool:
  return "layers" in v.get_metadata()["axes"] and bool(v.get_metadata()["out"])


def _is_routed(v: Any) -> bool:
  return bool({"experts", "routes"} & set(v.get_metadata()["axes"]))


def with_adapters(model: Any, adapters: Adapters) -> Any:
  """The model with its adapters in it: computed as the model it makes, layer by layer."""

  def one(path, v):
    adapter = adapters.get(jax.tree_util.keystr(path, simple=True, separator="."))
    return v if adapter is None else adapter.replace(weight=v)

  return jax.tree_util.tree_map_with_path(one, model, is_leaf=params.is_param)


def merge_attached(tree: Any) -> Any:
  """The tree with every adapter in it merged into its weight, which becomes float32."""
  is_adapter = lambda x: isinstance(x, Adapter)
  one = lambda x: x.merged_weight() if is_adapter(x) else x
  return jax.tree.map(one, tree, is_leaf=lambda x: is_adapter(x) or params.is_param(x))


def merge_adapters(model: Any, adapters: Adapters) -> Any:
  """The model that they make, each weight rounded to the dtype that it had."""
  whole = merge_attached(with_adapters(model, adapters))
  return params.map_params(lambda v, was: v.replace(v[...].astype(was.dtype)), whole, model)
