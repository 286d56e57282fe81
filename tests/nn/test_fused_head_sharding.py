"""The fused head on virtual meshes: the same numbers, and what the devices send each other."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps as training_steps
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax.losses import DenseTargets, SampledTargets, TopKTargets, ce, kd
from distill_jax.models import llama
from distill_jax.nn import fused_head, head_blocks, sharding
from distill_jax.preflight import collectives as hlo_text
from distill_jax.types import Batch, Inputs, Mean

KINDS_SENT = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS_SENT})(?:-start)?\((.*?)\)")
DIMS = re.compile(r"\w+\[([\d,]*)\]")
# Sizes by which arrays can be told apart in compiled code: D, K + 1 < V / 4, and a chunk's
# positions times D < V / 4 * D.
B, T, D, V, K, CHUNK = 4, 7, 8, 112, 5, 3
MESHES = [(2, 2, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4)]


def problem():
  """Returns targets from three teachers: online, top-k and sampled."""
  rng = np.random.default_rng(0)
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  hidden, rows = f32(rng.normal(size=(B, T, D))), f32(rng.normal(size=(V, D)))
  teacher, teacher_rows = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
  z = teacher @ teacher_rows.T
  logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
  top = np.argsort(-logp, -1)[..., :K]
  drawn = np.argsort(rng.random((B, T, V)), -1)[..., :K]
  weight = rng.dirichlet(np.ones(K), (B, T))
  entropy = f32(-(weight * np.log(weight)).sum(-1))
  targets = {
    "dense": DenseTargets(hidden_BTD=f32(teacher), head_VD=f32(teacher_rows)),
    "topk": TopKTargets(ids_BTK=jnp.asarray(top), logp_BTK=f32(np.take_along_axis(logp, top, -1))),
    "sampled": SampledTargets(
      ids_BTK=jnp.asarray(drawn), weight_BTK=f32(weight), entropy_BT=entropy
    ),
  }
  labels = jnp.asarray(rng.integers(0, V, (B, T)))
  mask = jnp.asarray(rng.random((B, T)) < 0.8)
  return hidden, rows, Batch(Inputs(labels, labels, labels), labels, mask, targets)


def loss_and_grads(hidden_BTD, head_VD, batch, argnums=(0, 1)):
  losses = {name: kd.Loss(teacher=name) for name in batch.targets} | {"hard": ce.Loss(z_loss=0.01)}
  count = jnp.sum(batch.mask_BT)

  def fn(z_BCV, piece):
    means = {n: Mean.of(f.token_loss(z_BCV, piece, 0), piece.mask_BT) for n, f in losses.items()}
    agree = Mean.of(jnp.argmax(z_BCV, -1) == piece.labels_BT, piece.mask_BT)
    return sum(m.total for m in means.values()) / count, means | {"agreement": agree}

  where = {"embed_axis": sharding.STORED}
  loss = lambda h, w: fused_head.loss(fn, h, w, batch, CHUNK, V - 2, **where)
  return jax.value_and_grad(loss, argnums=argnums, has_aux=True)(hidden_BTD, head_VD)


@functools.cache
def compiled(shape, argnums=(0, 1)):
  """Returns (result of the compiled function, its HLO) on a mesh, sharded as in training."""
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
  rows = NamedSharding(mesh, P(sharding.BATCH))
  vocab = NamedSharding(mesh, P("tensor"))
  hidden, head_VD, batch = problem()
  where = jax.tree.map(lambda _: rows, batch)
  where.targets["dense"] = where.targets["dense"].replace(head_VD=vocab)
  with jax.set_mesh(mesh):
    args = jax.device_put((hidden, head_VD, batch), (rows, vocab, where))
    grads = rows if argnums == 0 else (rows, NamedSharding(mesh, P("tensor", sharding.STORED)))
    run = functools.partial(loss_and_grads, argnums=argnums)
    out = ((NamedSharding(mesh, P()),) * 2, grads)
    program = jax.jit(run, out_shardings=out).lower(*args).compile()
    return jax.device_get(program(*args)), program.as_text()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Makes blocks so small that a head has several of them, and a chunk several parts."""
  monkeypatch.setattr(head_blocks, "BLOCK_BYTES", 8 * D * 4)
  monkeypatch.setattr(head_blocks, "LOGITS_BYTES", 2 * V * 4)


def collectives(hlo: str):
  """Returns (kind, loops around it, dims of operands and result) of the collectives in HLO text."""
  bodies, defined, name, loops = {}, {}, "", {}
  for line in hlo.splitlines():
    if re.match(r"(ENTRY )?%\S+ \(", line):
      name = line.removeprefix("ENTRY ").split()[0]
      bodies[name] = []
      if line.startswith("ENTRY"):
        loops[name] = 0
    elif name:
      bodies[name].append(line)
      if made := re.match(r"\s*(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ", line):
        defined[made[1]] = made[2]
  todo = list(loops)
  while todo:
    name = todo.pop()
    for compute, called in re.findall(
      r"(calls|to_apply|body)=(%[\w.\-]+)", "\n".join(bodies[name])
    ):
      depth = loops[name] + (compute == "body")
      if loops.get(called, -1) < depth:
        loops[called] = depth
        todo.append(called)
  found = []
  for name in loops:
    for hit in filter(None, map(COLLECTIVE.search, bodies[name])):
      text = " ".join([hit[1], *(defined[o] for o in re.findall(r"%[\w.\-]+", hit[3]))])
      dims = [tuple(int(n) for n in d.split(",") if n) for d in DIMS.findall(text)]
      found.append((hit[2], loops[name], dims))
  return found


@pytest.mark.parametrize("shape", MESHES)
def test_values_and_gradients_are_those_of_one_device(shape):
  """The order of float32 sums of up to 112 terms differs: a few units in the last place."""
  (got, _), (want, _) = compiled(shape), compiled((1, 1, 1))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("shape", MESHES)
def test_collectives_between_devices(shape):
  """With a sharded vocabulary, logits are not sent, and the head's gradient is summed once."""
  *batch_axes, S = shape
  positions = B // math.prod(batch_axes) * CHUNK  # in a chunk on one device
  found = collectives(compiled(shape)[1])
  for what, loops, dims in found:
    assert loops <= (S > 1), what  # at most once per chunk, not per block
    for d in dims:
      assert S == 1 or V not in d, (what, d)
      if loops:
        assert math.prod(d) < positions * V // S, (what, d)  # no logits
        assert math.prod(d) < V // S * D, (what, d)  # no head
  heads = [what for what, _, dims in found if (V // S, D) in dims]
  assert len(heads) == (math.prod(batch_axes) > 1)


def test_a_frozen_head_is_not_sent():
  """With the vocabulary over 2 devices, only the chunks' hidden gradients are summed over them."""
  shape = (1, 2, 2)
  (got, grad), hlo = compiled(shape, argnums=0)
  (want, (want_grad, _)), _ = compiled((1, 1, 1))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  np.testing.assert_allclose(grad, want_grad, atol=1e-6 * np.abs(want_grad).max())
  for what, loops, dims in collectives(hlo):
    assert loops <= 1, what
    for d in dims:
      assert math.prod(d) < V // 2 * D, (what, d)


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)])
def test_fsdp_gathers_the_head_once_per_step(shape):
  """A whole step of an untied model gathers its table and its head once each.

  Gradients of matrices are summed over `fsdp` first, and over `data` in the parts that are stored.
  """
  config = dataclasses.replace(llama.TINY, tie_word_embeddings=False)
  rows, D = config.vocab_size // shape[2], config.hidden_size
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
  step = training_steps.make_step()
  with jax.set_mesh(mesh):
    init = lambda key: step.init(llama.Model(config, key))
    where = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh, step.student.rules)
    state = jax.jit(init, out_shardings=where)(jax.random.key(0))
    batch = jax.device_put(training_steps.make_batch(), sharding.batch_sharding(mesh))
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    hlo = step_fn.lower(state, batch, {}).compile().as_text()
  found = [(what, loops) for what, loops, dims in collectives(hlo) if (rows, D) in dims]
  assert not any(loops for _, loops in found)
  assert sum(what == "all-gather" for what, _ in found) == 2
  # The gradient of the table is summed where its columns are.
  assert [what for what, _ in found if what != "all-gather"] == ["reduce-scatter"]
  groups = [
    hlo_text.group_size(op.text)
    for instructions in hlo_text.HloText(hlo).computations.values()
    for op in instructions.values()
    if op.opcode == "all-reduce" and str(config.intermediate_size // shape[2]) in op.shape
  ]
  assert max(groups) == 2
