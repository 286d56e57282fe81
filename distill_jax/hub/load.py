"""A model from a Hugging Face folder or a GGUF file, straight into its sharding."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.hub import declared, float8, prefixed, timm_vit
from distill_jax.hub.gguf_file import GGUFFile
from distill_jax.hub.gguf_tokenizer import tokenizer_files
from distill_jax.hub.locate import locate
from distill_jax.hub.safetensors_folder import SafetensorsFolder
from distill_jax.hub.tokenizer import TokenizerFiles, check_vocabulary, read_tokenizer
from distill_jax.hub.weights import FLOATS, Weights, float_dtype, read_json
from distill_jax.nn import layers, params, sharding

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Spans = tuple[tuple[int, int], ...]  # (first, past the last) along each axis
Progress = Callable[[int, int], None]  # (bytes of parameters done, in all)


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model that was found, its weights not yet read.

  Attributes:
    source: the words it was asked for with.
    family: the module of distill_jax.models.
    config: that family's Config.
    weights: the reader of its tensors.
    tokenizer: None where the folder holds none.
    generation: generation_config.json, with the special tokens' ids.
  """

  source: str
  family: str
  config: Any
  weights: Weights
  tokenizer: TokenizerFiles | None
  generation: dict[str, Any]

  @functools.cached_property
  def digest(self) -> str:
    """sha256, in hex, over the config and the bytes of the weight files in order of name."""

    def of(path: pathlib.Path) -> bytes:
      with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").digest()

    total = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
      for file_digest in pool.map(of, self.weights.files):
        total.update(file_digest)
    return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class New:
  """What a model is that is not quite as its source.

  Attributes:
    config: the family's Config of the model, all layers of the source in it.
    names: beginnings of Hugging Face's names of parameters that start random.
    key: of their initialisers.
  """

  config: Any
  names: tuple[str, ...] = ()
  key: Any = None

  def __contains__(self, name: str) -> bool:
    return name.startswith(self.names) if self.names else False


def open_model(source: str) -> Pretrained:
  """Finds a model and reads everything but its weights.

  Args:
    source: what `locate` takes: a .gguf file or a Hugging Face folder.

  Raises:
    InputError: not found, not readable, of an architecture that no family has, or with a
      tokenizer that does not fit the weights.
  """
  path = locate(source)
  if path.is_dir():
    if not (path / "config.json").exists():
      raise InputError(f"{path} holds no config.json; give a Hugging Face folder or a .gguf file")
    hf, extra = read_json(path / "config.json"), path / "generation_config.json"
    family = "vit" if (timm := timm_vit.is_one(hf)) else _family(hf, path)
    weights: Weights = float8.scaled(SafetensorsFolder(path), hf.get("quantization_config"), path)
    hf, weights = timm_vit.read(weights, path) if timm else (hf, weights)
    tokenizer, generation = read_tokenizer(path), read_json(extra) if extra.exists() else {}
  elif path.suffix == ".gguf":
    weights = file = GGUFFile(path)
    hf, tokenizer, generation = file.config(), tokenizer_files(file.meta, path), {}
    family = _family(hf, path)
  else:
    raise InputError(f"{path} is neither a folder nor a .gguf file; give one of them")
  config = _config(family, hf, path)
  module = registry.load("models", family)
  prefix, after = (getattr(module, name, "") for name in ("PREFIX", "AFTER"))
  weights = prefixed.prefixed(weights, prefix, after)
  if tokenizer is not None:
    check_vocabulary(tokenizer.size(), config.vocab_size)
  ids = {k: hf[k] for k in IDS if hf.get(k) is not None}
  return Pretrained(str(source), family, config, weights, tokenizer, {**ids, **generation})


def _family(hf: dict[str, Any], path: pathlib.Path) -> str:
  """The module of distill_jax.models that has this config.json's model_type."""
  kinds = {
    k: n for n in registry.names("models") for k in registry.load("models", n).HF_MODEL_TYPES
  }
  if not isinstance(kind := hf.get("model_type"), str) or kind not in kinds:
    raise InputError(
      f"{path} is of model_type {kind!r}, architectures {hf.get('architectures')}; the families "
      f"here have {', '.join(sorted(kinds))}"
    )
  return kinds[kind]


def _config(family: str, hf: dict[str, Any], path: pathlib.Path) -> Any:
  try:
    return registry.load("models", family).Config.from_hf(hf)
  except InputError as e:
    raise InputError(f"{path}: {e}") from e
  except KeyError as e:
    raise InputError(f"the config.json of {path} has no {e}, which {family} needs") from e
  except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
    raise InputError(f"the config.json of {path} has a value of the wrong kind ({e})") from e


def load(
  pretrained: Pretrained,
  mesh: Mesh,
  compute: layers.ComputeConfig,
  dtype: str = "float32",
  keep_layers: tuple[int, ...] = (),
  progress: Progress | None = None,
  new: New | None = None,
) -> Any:
  """The model, each parameter in `dtype` in its storage sharding on `mesh`.

  Only the slices that this process's devices hold are read. Beside the parameters, host
  memory holds two tensors of the checkpoint at a time, and the shard being filled where the
  device's memory is not the host's.

  Args:
    keep_layers: makes a student of these layers of the source, in this order; () is all.
    progress: called with (bytes done, bytes in all) after every tensor.
    new: how the model differs from its source; None: in nothing.

  Raises:
    InputError: a tensor is missing, unknown, misshaped or not a float; a size does not
      divide over the mesh; a layer to keep is not there.
  """
  new = new or New(pretrained.config)
  config, L = new.config, pretrained.config.num_hidden_layers
  if bad := [i for i in keep_layers if not 0 <= i < L]:
    raise InputError(f"keep_layers names layer {bad[0]}; {pretrained.source} has 0 to {L - 1}")
  family = registry.load("models", pretrained.family)
  build = lambda c: jax.eval_shape(lambda key: family.Model(c, key), jax.random.key(0))
  whole = build(config)
  _check_new(new, whole)
  _check(pretrained.weights, whole, pretrained, new)
  model = build(config.keep_layers(keep_layers) if keep_layers else config)
  places = sharding.shardings(model, mesh, compute.rules)
  to = float_dtype(dtype)
  total = sum(
    len(shards_here(v, place))
    * math.prod(place.shard_shape(v.shape))
    * declared.dtype_of(v, to).itemsize
    for v, place in zip(_leaves(model), jax.tree.leaves(places), strict=True)
  )
  start = _random(family, model, places, new, to)
  with ThreadPoolExecutor(2) as pool:  # one tensor is read while another is laid out
    filler = _Filler(pretrained.weights, to, keep_layers, progress, total, pool)

    def one(path, v, place):
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      return v.replace(start[name]) if name in start else filler.fill(v, place)

    return jax.tree_util.tree_map_with_path(one, model, places, is_leaf=params.is_param)


def _check_new(new: New, model: Any) -> None:
  names = {v.get_metadata()["hf"] for v in _leaves(model)}
  if lost := [start for start in new.names if not any(n.startswith(start) for n in names)]:
    raise InputError(
      f"new names {lost[0]!r}, with which no parameter of the model begins; they are called "
      f"{', '.join(sorted(names))}"
    )


def _random(family: Any, model: Any, places: Any, new: New, dtype: np.dtype) -> dict[str, Any]:
  """By path: the parameters that start random, in their sharding."""
  chosen = {path for path, v in params.named_params(model) if v.get_metadata()["hf"] in new}
  where = {p: place.get_value() for p, place in params.named_params(places) if p in chosen}

  def init(key):
    made = params.named_params(family.Model(model.config, key))
    return {p: v[...].astype(declared.dtype_of(v, dtype)) for p, v in made if p in chosen}

  return jax.jit(init, out_shardings=where)(new.key) if chosen else {}


def _leaves(tree: Any) -> list[Any]:
  return [v for _, v in params.named_params(tree)]


def _check(weights: Weights, model: Any, pretrained: Pretrained, new: New) -> None:
  """Every tensor that the source's model needs is there as declared, and none besides."""
  names, source = weights.names(), pretrained.source
  for v in _leaves(model):
    if v.get_metadata()["hf"] in new:
      continue
    shape = declared.Layout(v).shape
    for name, _ in declared.tensors(v):  # lazily: a damaged config can ask for millions
      if name not in names:
        raise InputError(
          f"{source} lacks the tensor {name}: its files and config.json disagree, or it is to "
          "start random, which `new` would say"
        )
      if weights.shape(name) != shape:
        raise InputError(
          f"{source}: {name} has shape {weights.shape(name)} where the config makes it {shape}"
        )
      if weights.dtype(name) not in FLOATS.values():
        raise InputError(
          f"{source}: {name} is {weights.dtype(name)}; {', '.join(FLOATS)} can be read"
        )
  known = [declared.matcher(v) for v in _leaves(model)]
  skips = pretrained.config.ignores_tensor
  known.append(new.__contains__)
  unknown = sorted(n for n in names if not any(k(n) for k in known) and not skips(n))
  if HEAD in unknown and pretrained.config.tie_word_embeddings:
    unknown.remove(HEAD)
    _check_tied(weights, source, getattr(pretrained.config, "TABLE", EMBED))
  if unknown:
    raise InputError(
      f"{source} holds {unknown[0]} ({len(unknown)} such in all), which its model does not have; "
      "the files and config.json disagree"
    )


def _check_tied(weights: Weights, source: str, table: str, rows: int = 4096) -> None:
  """A stored head of a tied model has to be the embedding table."""
  same = weights.shape(HEAD) == weights.shape(table)
  for i in range(0, weights.shape(table)[0] if same else 0, rows):
    at = (slice(i, i + rows), slice(None))
    same = same and np.array_equal(weights.read(HEAD, at), weights.read(table, at), equal_nan=True)
  if not same:
    raise InputError(
      f"{source} ties its embeddings and holds another {HEAD}; set tie_word_embeddings to false in "
      "config.json if the head is its own"
    )


@dataclasses.dataclass
class _Filler:
  """Fills parameters from tensors, counting the bytes."""

  weights: Weights
  dtype: np.dtype
  keep: tuple[int, ...]
  progress: Progress | None
  total: int
  pool: ThreadPoolExecutor
  done: int = 0

  def fill(self, v: Any, where: Any) -> Any:
    """The parameter `v` (abstract), its value read into the sharding in `where`.

    One shard after another, where jax.make_array_from_callback would keep all of this
    process's shards of a stacked parameter on the host at once.
    """
    place: NamedSharding = where.get_value()
    arrays: dict[Any, jax.Array] = {}
    for spans, devices in shards_here(v, place).items():
      x = self.shard(v, spans)
      arrays |= {d: jax.device_put(x, d).block_until_ready() for d in devices}
    order = place.addressable_devices_indices_map(v.shape)
    return v.replace(
      jax.make_array_from_single_device_arrays(v.shape, place, [arrays[d] for d in order])
    )

  def shard(self, v: Any, spans: Spans) -> np.ndarray:
    """The part of `v` between `spans`, (first, past the last) along each axis."""
    index = tuple(slice(a, b) for a, b in spans)
    out = _aligned(tuple(b - a for a, b in spans), declared.dtype_of(v, self.dtype))
    loops, layout = len(declared.loop_axes(v)), declared.Layout(v)
    read, shape, left = layout.slices(index[loops:])

    def one(tensor: tuple[str, tuple[int, ...]]) -> int:
      name, at = tensor
      within: tuple[Any, ...] = tuple(i - a for i, (a, _) in zip(at, spans, strict=False))
      here = out[(*within, ...)]
      layout.to_ours(self.weights.read(name, read), shape, left, here)
      return here.nbytes

    for n in self.pool.map(one, declared.tensors(v, index, self.keep)):
      self.done += n
      if self.progress is not None:
        self.progress(self.done, self.total)
    return out


def shards_here(v: Any, place: NamedSharding) -> dict[Spans, list[Any]]:
  """The different parts of `v` that this process holds, each with its devices."""
  parts: dict[Spans, list[Any]] = {}
  for device, index in place.addressable_devices_indices_map(v.shape).items():
    assert index is not None  # this process's own devices have one
    spans = tuple(s.indices(n)[:2] for s, n in zip(index, v.shape, strict=True))
    parts.setdefault(spans, []).append(device)
  return parts


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Empty, at a multiple of 64 bytes: on CPU jax then takes the memory without a copy."""
  n = math.prod(shape) * dtype.itemsize
  raw = np.empty(n + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + n].view(dtype).reshape(shape)
