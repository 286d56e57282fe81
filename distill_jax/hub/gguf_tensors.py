"""The tensors of a GGUF file, computed in parts from those of a Hugging Face checkpoint.

Their names are those of llama.cpp, which stores some tensors differently: see Architecture. The
experts of a layer are one tensor, whose parts follow each other. Norms, biases and routers are
float32, as llama.cpp expects them.

A part of at most 64 MB of float32 is read, changed and encoded at a time, so that memory does not
grow with the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from distill_jax.errors import InputError, bad_value
from distill_jax.hub import rounding
from distill_jax.hub.gguf_architectures import Architecture
from distill_jax.hub.tensors import Constant, Encoded, FileTensor, Finish, Source, Tensor
from distill_jax.nn.quantise import UNROUNDED, QuantiseOptions
from distill_jax.runtime import extras
from distill_jax.runtime.saved_arrays import Sums

with extras.needed("gguf"):
  import gguf
  from gguf import quants

QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
# The largest number of a type: that of float16, times the largest integer if it is a scale.
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}
ALIGNMENT = 32
TABLES = ("token_embd.weight", "output.weight")
Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
  """A tensor of a GGUF file.

  Attributes:
    name: its name in llama.cpp.
    quant: the type of its numbers, one of QUANTS.
    shape: its shape in numpy's order.
    role: "linear", "table" (embedding or head) or "exact" (no blocks, whatever others have).
    parts: its contents, one after the other.
  """

  name: str
  quant: str
  shape: tuple[int, ...]
  role: str
  parts: tuple[FileTensor, ...]

  @property
  def values_nbytes(self) -> int:
    """The size without padding."""
    block, size = _block(self.quant)
    return math.prod(self.shape) // block * size

  @property
  def nbytes(self) -> int:
    """The size in the file, up to the next tensor."""
    return -(-self.values_nbytes // ALIGNMENT) * ALIGNMENT

  def reads(self, source: Source, sums: Sums) -> Iterator[Callable[[], Finish]]:
    padding = Constant("", np.zeros(self.nbytes - self.values_nbytes, np.uint8))
    for part in (*self.parts, padding):
      yield from part.reads(source, sums)


@dataclasses.dataclass(frozen=True)
class Numbers:
  """The types of the tensors of a GGUF file.

  Attributes:
    quant: the type of the linear weights of layers.
    embedding: the type of the embedding table and of the head.
    widths: the types of single linear weights, by their names in the GGUF file.
    trained: the grid on which the linear weights were trained.
  """

  quant: str
  embedding: str
  widths: Mapping[str, str] = dataclasses.field(default_factory=dict)
  trained: QuantiseOptions = UNROUNDED


def encode(x: np.ndarray, quant: str, name: str) -> np.ndarray:
  """Returns rows of float32 in a type of GGUF, of the same bits as llama.cpp's reference code.

  Args:
    x: the rows; the last axis is divisible by the blocks of the type.
    quant: the type, one of QUANTS.
    name: the name of the tensor, for errors.

  Raises:
    InputError: A value is not finite or is too large for the type.
  """
  top = max(x.max(), -x.min())
  largest = LARGEST.get(quant, np.finfo(np.float32).max)
  if not top <= largest:  # also if it is NaN
    raise InputError(
      f"{name} contains {top:.6g}, but the maximum of {quant} is {largest:.6g}. Set export.quant "
      "and export.embedding to 'F32', or export an earlier step if it is not a number."
    )
  return quants.quantize(np.ascontiguousarray(x), gguf.GGMLQuantizationType[quant])


def gguf_tensors(
  tensors: Sequence[Tensor], arch: Architecture, numbers: Numbers
) -> list[GGUFTensor]:
  """Returns the tensors of a GGUF file, in its order.

  Args:
    tensors: the tensors of the model.
    arch: the architecture of the model.
    numbers: the types of the tensors.

  Raises:
    InputError: llama.cpp does not know a tensor, or blocks do not divide the width of one.
  """
  names = gguf.get_tensor_name_map(_number(arch.name), int(arch.metadata["block_count"]))
  merged: dict[str, list[Tensor]] = {}
  for tensor in tensors:
    merged.setdefault(_name(tensor.name, names, arch), []).append(tensor)
  out: list[GGUFTensor] = []
  if (factors := arch.rope_factors) is not None:
    name = "rope_freqs.weight"
    out.append(GGUFTensor(name, "F32", factors.shape, "exact", (Constant(name, factors),)))
  for name, group in merged.items():
    if ".attn_kv_b." in name and arch.latent_heads is not None:
      out += _latent_heads(name, group[0], arch.latent_heads, numbers)
    else:
      out.append(_gguf_tensor(name, group, arch, numbers))
  return out


def _number(name: str) -> gguf.MODEL_ARCH:
  return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _name(hf: str, names: gguf.TensorNameMap, arch: Architecture) -> str:
  """Returns the name of a checkpoint's tensor in llama.cpp."""
  known = re.sub(r"\.experts\.\d+\.", ".experts.", hf)
  known = known.replace("e_score_correction_bias", "e_score_correction.bias")
  name = names.get_name(known, try_suffixes=(".weight", ".bias"))
  if name is None:
    raise InputError(
      f"llama.cpp's architecture {arch.name!r} has no tensor for {hf}. Set export.format to 'hf'."
    )
  return name


def _gguf_tensor(
  name: str, group: Sequence[Tensor], arch: Architecture, numbers: Numbers
) -> GGUFTensor:
  """Returns the tensor of the file that consists of the checkpoint's tensors with one name."""
  shape = (len(group), *group[0].shape) if "_exps." in name else group[0].shape
  if len(shape) == 1 or ".ffn_gate_inp." in name:
    change = _same
    if name.endswith("norm.weight") and arch.norm_offset:
      factor = arch.query_factor if ".attn_q_norm." in name else 1.0
      change = functools.partial(_norm, offset=arch.norm_offset, factor=factor)
    return _tensor(name, "F32", shape, "exact", group, [change])
  if name in TABLES:
    return _tensor(name, numbers.embedding, shape, "table", group, [_same])
  change = _same
  if re.search(r"\.attn_[qk]\.", name) and arch.interleaved:
    change = functools.partial(_interleave, width=int(arch.metadata["attention.key_length"]))
  quant = numbers.widths.get(name, numbers.quant)
  return _tensor(name, quant, shape, "linear", group, [_on_grid(name, quant, numbers), change])


def _latent_heads(
  name: str, tensor: Tensor, widths: tuple[int, int], numbers: Numbers
) -> list[GGUFTensor]:
  """Returns the two halves of a matrix that expands latents to keys and values of heads.

  llama.cpp multiplies queries with the transposed keys, whose inputs are in another axis than those
  of a trained grid. And on CPUs with AMX its products with several matrices in blocks abort or give
  NaN (0.4.0). Both are therefore float32 if other weights have blocks: 1 in 650 of R1's numbers.
  """
  (u, w), rank = widths, tensor.shape[1]
  heads = tensor.shape[0] // (u + w)
  quant = "F32" if numbers.trained.grid or _block(numbers.quant)[0] > 1 else numbers.quant
  keys: Change = functools.partial(_keys, widths=widths)
  values: Change = functools.partial(_values, widths=widths)
  k, v = (name.replace("attn_kv_b", f"attn_{kind}_b") for kind in "kv")
  of = functools.partial(_tensor, quant=quant, role="exact", group=[tensor])
  on_grid = _on_grid(name, quant, numbers)
  return [
    of(k, shape=(heads, rank, u), changes=[on_grid, keys]),
    of(v, shape=(heads, w, rank), changes=[on_grid, values], readers=1),
  ]


def _tensor(
  name: str,
  quant: str,
  shape: tuple[int, ...],
  role: str,
  group: Sequence[Tensor],
  changes: Sequence[Change],
  readers: int = 0,
) -> GGUFTensor:
  """Returns a tensor whose parts are computed from rows by `changes` and then encoded."""
  block, size = _block(quant)
  if shape[-1] % block:
    key = "export.embedding" if role == "table" else "export.quant"
    expected = f"'F32', 'F16' or 'BF16', because blocks of {block} do not divide the "
    raise bad_value(key, quant, f"{expected}{shape[-1]} inputs of {name}", "Change it")

  def write(x: np.ndarray) -> np.ndarray:
    for change in changes:
      x = change(x)
    return encode(x, quant, name).reshape(-1).view(np.uint8)

  of_part = (math.prod(shape) // len(group) // block * size,)
  parts = (Encoded(name, t, write, of_part, np.dtype(np.uint8), readers) for t in group)
  return GGUFTensor(name, quant, shape, role, tuple(parts))


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _on_grid(name: str, quant: str, numbers: Numbers) -> Change:
  """Returns the function that rounds rows to the grid of training, unless `quant` is that grid."""
  if numbers.trained.grid in ("", quant):
    return _same
  return functools.partial(rounding.on_grid, name, spec=numbers.trained)


def _norm(x: np.ndarray, offset: float, factor: float) -> np.ndarray:
  return (x + np.float32(offset)) * np.float32(factor)


def _interleave(x: np.ndarray, width: int) -> np.ndarray:
  """Returns rows of heads, row i of a head's second half after row i of its first half."""
  halves = x.reshape(-1, 2, width // 2, x.shape[-1])
  return halves.swapaxes(1, 2).reshape(x.shape)


def _keys(x: np.ndarray, widths: tuple[int, int]) -> np.ndarray:
  """Returns the rows of heads that are keys, transposed."""
  return x.reshape(-1, sum(widths), x.shape[-1])[:, : widths[0]].swapaxes(1, 2)


def _values(x: np.ndarray, widths: tuple[int, int]) -> np.ndarray:
  """Returns the rows of heads that are values."""
  return x.reshape(-1, sum(widths), x.shape[-1])[:, widths[0] :]


def _block(quant: str) -> tuple[int, int]:
  """Returns (numbers, bytes) of a block."""
  return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant]]
