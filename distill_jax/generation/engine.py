"""Decoding on devices: prompts are prefilled into a KV cache, then rows are decoded in steps.

Axes, in addition to those of types.py: P, the prompts that are prefilled at once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, Sharding
from jax.tree_util import PyTreeDef

from distill_jax.generation.sampling import Sampling, choose
from distill_jax.generation.unrolled import Unrolled, empty_cache
from distill_jax.models import DecoderCache as Cache
from distill_jax.nn import fused_head, kv_cache, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import sampler
from distill_jax.records.options import RecordsOptions
from distill_jax.types import Inputs


class RowState(struct.PyTreeNode):
  """The state of the rows of a batch. Arrays are numpy's outside of compiled functions.

  Attributes:
    token_B: int32, the last token, which is the model's next input.
    position_B: int32, the position of that token.
    last_B: int32, the last position of the row.
    alive_B: bool, False for idle rows.
    prompt_B: int32, the index of the prompt.
    sample_B: int32, the index of the sample.
  """

  token_B: Any
  position_B: Any
  last_B: Any
  alive_B: Any
  prompt_B: Any
  sample_B: Any


@dataclasses.dataclass(frozen=True)
class EngineSpec:
  """The static settings of decoding.

  Attributes:
    compute: The compute settings.
    sampling: The sampling settings.
    steps: The maximum number of tokens that one call generates per row.
    eos: Tokens that end a row.
    vocab_size: The number of tokens; further rows of the head are padding.
    records: Settings for recording the distribution of each token. None: nothing is recorded.
    cache_dtype: The dtype of the KV cache; see nn/kv_cache.py.
  """

  compute: ComputeConfig
  sampling: Sampling
  steps: int
  eos: tuple[int, ...]
  vocab_size: int
  records: RecordsOptions | None = None
  cache_dtype: str = ""


class Engine:
  """A model with a KV cache for decoding and another one for prompts.

  Prompts are prefilled into the prompt cache and then copied into rows of the decoding cache. All
  calls have the same shapes and rows are independent, so the result of a row depends neither on its
  index nor on the other rows.

  The weights are arguments of the compiled programs, which a process keeps: an engine for other
  weights of the same model, e.g. those of a later step of training, compiles nothing.

  Args:
    model: The model.
    mesh: The devices.
    spec: The static settings.
    rows: The number of rows of the decoding cache.
    prefill_rows: The number of rows of the prompt cache.
    size: The number of positions of each row.
    keys: Random keys by name: "generate" for tokens, "records" for the offsets of records.
  """

  def __init__(
    self,
    model: Unrolled,
    mesh: Mesh,
    spec: EngineSpec,
    rows: int,
    prefill_rows: int,
    size: int,
    keys: dict[str, jax.Array],
  ):
    self._model, self._keys = model, keys
    make = functools.partial(
      empty_cache, model, size=size, compute=spec.compute, mesh=mesh, dtype=spec.cache_dtype
    )
    self._cache, self._prompt_cache = make(rows=rows), make(rows=prefill_rows)
    leaves, tree = jax.tree.flatten((self._cache, self._prompt_cache))
    self._programs = _programs(spec, mesh, tree, tuple(x.sharding for x in leaves))

  def prefill(self, tokens_PC: np.ndarray, first_P: np.ndarray, count_P: np.ndarray) -> None:
    """Prefills tokens of each prompt into the prompt cache; see the function `prefill`."""
    self._prompt_cache = self._programs.prefill(
      self._model, self._prompt_cache, tokens_PC, first_P, count_P
    )

  def insert(self, from_P: np.ndarray, to_P: np.ndarray, slots: int) -> None:
    """Copies rows of the prompt cache into the decoding cache; see the function `insert`.

    Args:
      from_P: int32, rows of the prompt cache.
      to_P: int32, rows of the decoding cache.
      slots: The number of slots that prompts fill. Blocks without them are not copied.
    """
    sizes = kv_cache.sizes(self._cache[0], self._model.blocks[0].CACHE)
    for n, first in enumerate(itertools.accumulate(sizes[:-1], initial=0)):
      if first < slots:
        read = kv_cache.block(self._prompt_cache, n)
        new = self._programs.insert(kv_cache.block(self._cache, n), read, from_P, to_P)
        self._cache = kv_cache.with_block(self._cache, n, new)

  def decode(self, rows: RowState) -> dict[str, np.ndarray]:
    """Generates the next tokens of each row, and returns the arrays of `decode_steps`."""
    self._cache, outputs = self._programs.decode(self._model, self._cache, rows, self._keys)
    return jax.device_get(outputs)


class _Programs(NamedTuple):
  prefill: Callable[..., Cache]
  insert: Callable[..., kv_cache.CacheBlock]
  decode: Callable[..., tuple[Cache, dict[str, jax.Array]]]


@functools.lru_cache(maxsize=8)
def _programs(
  spec: EngineSpec, mesh: Mesh, tree: PyTreeDef, shardings: tuple[Sharding, ...]
) -> _Programs:
  """Returns the compiled functions of an engine, which jax compiles for each model's shapes.

  Args:
    spec: The static settings.
    mesh: The devices.
    tree: The structure of the two caches, of rows and of prompts.
    shardings: The shardings of their arrays.
  """
  cache, prompt_cache = jax.tree.unflatten(tree, shardings)
  fill = functools.partial(prefill, compute=spec.compute)
  steps = functools.partial(decode_steps, spec=spec)
  return _Programs(
    jax.jit(fill, donate_argnums=1, out_shardings=prompt_cache),
    jax.jit(insert, donate_argnums=0, out_shardings=kv_cache.block(cache, 0)),
    jax.jit(steps, donate_argnums=1, out_shardings=(cache, sharding.replicated(mesh))),
  )


def prefill(
  model: Unrolled,
  cache: Cache,
  tokens_PC: jax.Array,
  first_P: jax.Array,
  count_P: jax.Array,
  *,
  compute: ComputeConfig,
) -> Cache:
  """Prefills tokens of each prompt into a cache.

  Args:
    model: The model.
    cache: The cache.
    tokens_PC: int32, the next tokens of each prompt.
    first_P: int32, the position of the first token.
    count_P: int32, the number of tokens; the rest of the row is padding.
    compute: The compute settings.

  Returns:
    The new cache.
  """
  i_PC = jnp.broadcast_to(jnp.arange(tokens_PC.shape[1], dtype=jnp.int32)[None], tokens_PC.shape)
  real_PC = (i_PC < count_P[:, None]).astype(jnp.int32)
  return model.decode_step(Inputs(tokens_PC, first_P[:, None] + i_PC, real_PC), cache, compute)[1]


def insert(
  cache: kv_cache.CacheBlock,
  prompt_cache: kv_cache.CacheBlock,
  from_P: jax.Array,
  to_P: jax.Array,
) -> kv_cache.CacheBlock:
  """Copies rows `from_P` of a block of the prompt cache to rows `to_P` of that of the cache.

  Rows with a target beyond the end of the cache are dropped.
  """
  return jax.tree.map(lambda x, new: x.at[to_P].set(new[from_P], mode="drop"), cache, prompt_cache)


def decode_steps(
  model: Unrolled, cache: Cache, rows: RowState, keys: dict[str, jax.Array], *, spec: EngineSpec
) -> tuple[Cache, dict[str, jax.Array]]:
  """Generates up to spec.steps tokens for each row, and stops early if no row is alive.

  Args:
    model: The model.
    cache: The cache.
    rows: The state of the rows.
    keys: Random keys; see `Engine`.
    spec: The static settings.

  Returns:
    The cache, and a dict of arrays [steps, B, ...]:
      token: int32, the generated token, or -1.
      logp: float32, its log-probability under the model, without temperature and truncation.
      record_NAME: The field NAME of sampler.of_logits, with spec.records.
  """
  step = functools.partial(_decode_step, model, keys=keys, spec=spec)
  shapes = jax.eval_shape(lambda cache, rows: step(cache, rows)[2], cache, rows)
  outputs = {name: jnp.zeros((spec.steps, *x.shape), x.dtype) for name, x in shapes.items()}
  outputs["token"] -= 1

  def body(carry):
    n, cache, rows, outputs = carry
    cache, rows, new = step(cache, rows)
    return n + 1, cache, rows, {name: x.at[n].set(new[name]) for name, x in outputs.items()}

  def unfinished(carry):
    n, _, rows, _ = carry
    return (n < spec.steps) & jnp.any(rows.alive_B)

  rows = jax.tree.map(jnp.asarray, rows)
  start = (jnp.int32(0), cache, rows, outputs)
  _, cache, _, outputs = jax.lax.while_loop(unfinished, body, start)
  return cache, outputs


def _decode_step(
  model: Unrolled, cache: Cache, rows: RowState, *, keys: dict[str, jax.Array], spec: EngineSpec
) -> tuple[Cache, RowState, dict[str, jax.Array]]:
  """Generates one token for each row, and returns (cache, rows, arrays [B, ...])."""
  alive_B = rows.alive_B
  read = Inputs(*(x[:, None] for x in (rows.token_B, rows.position_B, alive_B.astype(jnp.int32))))
  out, cache = model.decode_step(read, cache, spec.compute)
  with jax.named_scope("sample"):
    logits_B1V = fused_head.logits(out.hidden_BTD, out.head_VD, spec.vocab_size)
    logits_B1V = fused_head.soft_cap(logits_B1V, out.soft_cap)
    next_B = rows.position_B + 1
    new_B = choose(logits_B1V[:, 0], token_keys(keys["generate"], rows, next_B), spec.sampling)
    outputs = {"logp": fused_head.logp_at(logits_B1V, new_B[:, None, None])[:, 0, 0]}
    if spec.records is not None:
      u_B = jax.vmap(jax.random.uniform)(token_keys(keys["records"], rows, rows.position_B))
      sampled = sampler.SamplerSpec.of(spec.records, spec.vocab_size)
      recorded = sampler.of_logits(logits_B1V, new_B[:, None], u_B[:, None], sampled)
      outputs |= {f"record_{name}": x[:, 0] for name, x in recorded.items()}
    outputs["token"] = jnp.where(alive_B, new_B, -1)
  ended_B = jnp.isin(new_B, jnp.asarray(spec.eos, jnp.int32)) | (next_B >= rows.last_B)
  rows = rows.replace(
    token_B=jnp.where(alive_B, new_B, rows.token_B),
    position_B=jnp.where(alive_B, next_B, rows.position_B),
    alive_B=alive_B & ~ended_B,
  )
  return cache, rows, outputs


def token_keys(key: jax.Array, rows: RowState, position_B: jax.Array) -> jax.Array:
  """Returns a random key for each row that depends only on (seed, prompt, sample, position)."""
  fold_in = jax.vmap(jax.random.fold_in)
  prompt_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows.prompt_B)
  return fold_in(fold_in(prompt_keys_B, rows.sample_B), position_B)
