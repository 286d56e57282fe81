"""Decoding on the device: prompts into the cache, rows of it, several steps at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from distill_jax import config
from distill_jax.generation.sampling import Sampling, choose
from distill_jax.generation.unrolled import Unrolled, empty_cache
from distill_jax.models import DecoderCache as Cache
from distill_jax.nn import fused_head, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import sampler
from distill_jax.types import Inputs


class Rows(struct.PyTreeNode):
  """What the rows of a batch go on from; int32 [B]."""

  token_B: Any  # the last token, which the model has not read yet
  position_B: Any  # of that token
  last_B: Any  # the position of the last token that there may be
  alive_B: Any  # bool; other rows are idle
  prompt_B: Any  # its number, and the sample's
  sample_B: Any


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is compiled.

  Attributes:
    steps: tokens of a row that one call makes, at most.
    eos: tokens that end a row.
    vocab_size: rows of the head from here on are padding.
    records: what else is kept of the distribution that each token is drawn from; None: nothing.
    cache_dtype: see models/_cache.py.
  """

  compute: ComputeConfig
  sampling: Sampling
  steps: int
  eos: tuple[int, ...]
  vocab_size: int
  records: config.RecordsOptions | None = None
  cache_dtype: str = ""


class Device:
  """A model with a cache of `rows` rows of `size` positions, and one of `fill` rows for prompts.

  Shapes are the same in all calls and rows know nothing of each other, so what becomes of a
  row depends on neither its place nor its company.
  """

  def __init__(
    self,
    model: Unrolled,
    mesh: Mesh,
    spec: Spec,
    rows: int,
    fill: int,
    size: int,
    keys: dict[str, jax.Array],
  ):
    """`keys`: "generate" for the tokens, "records" for the records' offsets."""
    self._model, self._keys = model, keys
    make = functools.partial(
      empty_cache, model, size=size, compute=spec.compute, mesh=mesh, dtype=spec.cache_dtype
    )
    self._cache, self._filled = make(rows=rows), make(rows=fill)
    place = lambda cache: jax.tree.map(lambda x: x.sharding, cache)
    where, there = place(self._cache), place(self._filled)
    jit = functools.partial(jax.jit, donate_argnums=1)
    self._prefill = jit(functools.partial(prefill, compute=spec.compute), out_shardings=there)
    self._insert = jax.jit(insert, donate_argnums=0, out_shardings=where)
    said = sharding.replicated(mesh)
    self._steps = jit(functools.partial(steps, spec=spec), out_shardings=(where, said))

  def prefill(self, tokens_PC: Any, first_P: Any, count_P: Any) -> None:
    """Tokens first, first + 1, … of each prompt into the cache of prompts; `count` of them."""
    self._filled = self._prefill(self._model, self._filled, tokens_PC, first_P, count_P)

  def insert(self, from_P: Any, to_P: Any) -> None:
    """Copies rows of the cache of prompts; what goes to a row that is not there is left out."""
    self._cache = self._insert(self._cache, self._filled, from_P, to_P)

  def steps(self, rows: Rows) -> dict[str, Any]:
    """Goes on; returns arrays [steps, B, ...]: see `steps`."""
    self._cache, said = self._steps(self._model, self._cache, rows, self._keys)
    return jax.device_get(said)


def prefill(
  model: Unrolled,
  cache: Cache,
  tokens_PC: jax.Array,
  first_P: jax.Array,
  count_P: jax.Array,
  *,
  compute: ComputeConfig,
) -> Cache:
  i_PC = jnp.broadcast_to(jnp.arange(tokens_PC.shape[1], dtype=jnp.int32)[None], tokens_PC.shape)
  real_PC = (i_PC < count_P[:, None]).astype(jnp.int32)
  return model.decode_step(Inputs(tokens_PC, first_P[:, None] + i_PC, real_PC), cache, compute)[1]


def insert(cache: Cache, filled: Cache, from_P: jax.Array, to_P: jax.Array) -> Cache:
  return jax.tree.map(lambda x, new: x.at[to_P].set(new[from_P], mode="drop"), cache, filled)


def steps(
  model: Unrolled, cache: Cache, rows: Rows, keys: dict[str, jax.Array], *, spec: Spec
) -> tuple[Cache, dict[str, jax.Array]]:
  """Up to spec.steps tokens of each row that is alive, fewer once none is.

  Returns: the cache, and arrays [steps, B, ...]: `token`, -1 where there is none; `logp`, its
    log-probability under the model as it is; with spec.records, what sampler.of_logits says.
  """
  one = functools.partial(_step, model, keys=keys, spec=spec)
  shapes = jax.eval_shape(lambda cache, rows: one(cache, rows)[2], cache, rows)
  said = {name: jnp.zeros((spec.steps, *x.shape), x.dtype) for name, x in shapes.items()}
  said["token"] -= 1

  def body(carry):
    n, cache, rows, said = carry
    cache, rows, new = one(cache, rows)
    return n + 1, cache, rows, {name: x.at[n].set(new[name]) for name, x in said.items()}

  more = lambda carry: (carry[0] < spec.steps) & jnp.any(carry[2].alive_B)
  rows = jax.tree.map(jnp.asarray, rows)
  _, cache, _, said = jax.lax.while_loop(more, body, (jnp.int32(0), cache, rows, said))
  return cache, said


def _step(
  model: Unrolled, cache: Cache, rows: Rows, *, keys: dict[str, jax.Array], spec: Spec
) -> tuple[Cache, Rows, dict[str, jax.Array]]:
  alive_B = rows.alive_B
  read = Inputs(*(x[:, None] for x in (rows.token_B, rows.position_B, alive_B.astype(jnp.int32))))
  out, cache = model.decode_step(read, cache, spec.compute)
  with jax.named_scope("sample"):
    z_B1V = fused_head.logits(out.hidden_BTD, out.head_VD, spec.vocab_size)
    z_B1V = fused_head.soft_cap(z_B1V, out.soft_cap)
    next_B = rows.position_B + 1
    new_B = choose(z_B1V[:, 0], token_keys(keys["generate"], rows, next_B), spec.sampling)
    said = {"logp": fused_head.logp_at(z_B1V, new_B[:, None, None])[:, 0, 0]}
    if spec.records is not None:
      u_B = jax.vmap(jax.random.uniform)(token_keys(keys["records"], rows, rows.position_B))
      c = spec.records
      kept = sampler.of_logits(
        z_B1V,
        new_B[:, None],
        u_B[:, None],
        n=c.n,
        kind=c.kind,
        logp=c.logp or c.kind == "topk",
        temperature=c.temperature,
        nucleus=c.nucleus,
        vocab_size=spec.vocab_size,
      )
      said |= {f"record_{name}": x[:, 0] for name, x in kept.items()}
    said["token"] = jnp.where(alive_B, new_B, -1)
  ended_B = jnp.isin(new_B, jnp.asarray(spec.eos, jnp.int32)) | (next_B >= rows.last_B)
  rows = rows.replace(
    token_B=jnp.where(alive_B, new_B, rows.token_B),
    position_B=jnp.where(alive_B, next_B, rows.position_B),
    alive_B=alive_B & ~ended_B,
  )
  return cache, rows, said


def token_keys(key: jax.Array, rows: Rows, position_B: jax.Array) -> jax.Array:
  """A key for each row, of (seed, prompt, sample, position) and nothing else."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  each = jax.vmap(jax.random.fold_in)
  return each(each(fold(key, rows.prompt_B), rows.sample_B), position_B)
