"""The files of integer weights of an export, in the format of compressed-tensors (compressed.py).

The linear weights of layers are stored as integers, all other weights as before. How int8 and int4
are stored depends on what can run it (seen in transformers 5.23 and vLLM 0.32):

  int4                             "pack-quantized": transformers and vLLM, on CPUs and GPUs.
  int8, one scale for each output  "int-quantized": the same. When the model runs, the inputs of
                                   linear layers are rounded to 8 bits as well, each token by
                                   itself: vLLM has no other product with int8 weights on CPUs.
  int8, with groups or experts     "pack-quantized": transformers, and vLLM on GPUs. transformers
                                   can read experts in no other way.

A weight with R outputs, C inputs and groups of g inputs has R * C * bits / 8 bytes of integers,
2 * R * C / g bytes of scales, and 16 bytes of its shape. It is read twice from a checkpoint, for
the integers and for the scales, so that a process holds only the parts that it reads ahead.

The scales are bfloat16 numbers. If the other weights are float32, they are stored as float32, too:
where transformers dequantises on loading (experts), it computes in the dtype of the scales.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator

import jax
import ml_dtypes
import numpy as np

from distill_jax.errors import bad_value
from distill_jax.hub import compressed, rounding
from distill_jax.hub.compressed import Scheme
from distill_jax.hub.tensors import Constant, Encoded, Tensor, tensors_of
from distill_jax.nn import grids, params
from distill_jax.nn.quantise import QuantiseOptions, is_quantised
from distill_jax.runtime import distributed
from distill_jax.types import JsonObject, PyTree

# Heads that are linear layers in transformers, even where the embedding table is their weight.
HEADS = ("lm_head", "proj_out")
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def scheme_of(model: PyTree, integers: QuantiseOptions) -> Scheme:
  """Returns how the linear weights of a model (or its shapes) are stored."""
  bits = grids.BITS[integers.grid]
  axes = [v.get_metadata()["axes"] for _, v in params.named_params(model) if is_quantised(v)]
  packed = bits == 4 or integers.group > 0 or any("experts" in a for a in axes)
  return Scheme(bits, integers.group, packed)


def check(model: PyTree, integers: QuantiseOptions) -> None:
  """Raises InputError if the inputs of a weight do not fill groups, or words of 32 bits."""
  scheme, every = scheme_of(model, integers), tensors_of(model, np.dtype(np.float32))
  for _ in file_tensors(every, scheme, integers, np.dtype(np.float32)):
    pass


def file_tensors(
  tensors: Iterable[Tensor], scheme: Scheme, trained: QuantiseOptions, dtype: np.dtype
) -> Iterator[Tensor | Encoded | Constant]:
  """Yields the tensors of the files for those of a model.

  Args:
    tensors: those of the model.
    scheme: how its linear weights are stored.
    trained: the grid on which they were trained, if any.
    dtype: the dtype of other weights.

  Raises:
    InputError: The inputs of a weight do not fill groups, or words of 32 bits.
  """
  of_scales = np.dtype(np.float32 if dtype == np.float32 else ml_dtypes.bfloat16)
  for t in tensors:
    if not is_quantised(t.param):
      yield t
      continue
    rows, columns = t.shape
    _check(t.name, columns, scheme)
    encode = functools.partial(_encode, t.name, scheme, trained)
    integers = functools.partial(_integers, encode, scheme)
    if scheme.packed:
      words = (rows, columns // scheme.per_word)
      yield Encoded(t.name + "_packed", t, integers, words, np.dtype(np.int32))
      yield Constant(t.name + "_shape", np.array(t.shape, np.int64))
    else:
      yield Encoded(t.name, t, integers, t.shape, np.dtype(np.int8))
    scales = functools.partial(_scales, encode, of_scales)
    groups = (rows, columns // (scheme.group or columns))
    yield Encoded(t.name + "_scale", t, scales, groups, of_scales, readers=1)


def quantization_config(model: PyTree, scheme: Scheme) -> JsonObject:
  """Returns `quantization_config` of config.json.

  Args:
    model: the model, or its shapes.
    scheme: how its linear weights are stored.
  """
  weights = _arguments(scheme.bits, "group" if scheme.group else "channel", dynamic=False)
  if scheme.group:
    weights["group_size"] = scheme.group
  inputs = None if scheme.packed else _arguments(8, "token", dynamic=True)
  group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
  return {
    "quant_method": compressed.METHOD,
    "format": compressed.PACKED if scheme.packed else compressed.INTEGERS,
    "quantization_status": "compressed",
    "config_groups": {"group_0": {**group, "output_activations": None}},
    "ignore": [_pattern(module) for module in _float_layers(model)],
  }


def _arguments(bits: int, strategy: str, dynamic: bool) -> JsonObject:
  shared = {"num_bits": bits, "type": "int", "symmetric": True}
  return {**shared, "strategy": strategy, "dynamic": dynamic}


def _float_layers(model: PyTree) -> list[str]:
  """Returns the names, without the numbers of layers, of linear layers without integers."""
  found = set(HEADS)
  for _, v in params.named_params(model):
    meta = v.get_metadata()
    if meta["out"] and not is_quantised(v) and meta["hf"].endswith(".weight"):
      found.add(meta["hf"].removesuffix(".weight"))
  return sorted(found)


def _pattern(layer: str) -> str:
  """Returns the pattern of a layer's name, which has a prefix in the modules of some models."""
  name = re.sub(r"\\{\w+\\}", lambda _: r"\d+", re.escape(layer))
  return rf"re:(.*\.)?{name}$"


def _integers(encode: Encode, scheme: Scheme, x_RC: np.ndarray) -> np.ndarray:
  """Returns the integers of rows in float32, in the form that is stored."""
  q_RC = encode(x_RC)[0]
  return compressed.pack(q_RC, scheme.bits) if scheme.packed else q_RC


def _scales(encode: Encode, dtype: np.dtype, x_RC: np.ndarray) -> np.ndarray:
  """Returns the scales of rows in float32."""
  return encode(x_RC)[1].astype(dtype)


def _encode(
  name: str, scheme: Scheme, trained: QuantiseOptions, x_RC: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (integers, scales) of rows in float32, computed on the host.

  Raises:
    InputError: A number is not finite.
  """
  grid = QuantiseOptions(f"int{scheme.bits}", scheme.group)
  if trained.grid and trained != grid:
    x_RC = rounding.on_grid(name, x_RC, trained)
  with jax.default_device(distributed.host_device()):
    q_RC, scale_RG = map(np.asarray, _encode_rows(x_RC, grid.grid, grid.group))
  if not np.isfinite(scale_RG.astype(np.float32)).all():
    raise rounding.not_finite(name, x_RC, grid)
  return q_RC, scale_RG


_encode_rows = jax.jit(grids.encode, static_argnums=(1, 2))


def _check(name: str, columns: int, scheme: Scheme) -> None:
  if scheme.group and columns % scheme.group:
    expected = f"a divisor of {columns}, the number of inputs of {name}"
    raise bad_value("export.group", scheme.group, expected, "Choose a divisor, or 0")
  if columns % scheme.per_word:
    expected = f"'float', because {name} has {columns} inputs, not a multiple of {scheme.per_word}"
    raise bad_value("export.quant", f"int{scheme.bits}", expected, "Change it")
