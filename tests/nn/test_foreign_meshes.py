"""The fused head and the sampler on foreign meshes: the numbers of one device, or a sentence.

The meshes are one with axes ("x", "y"), Tunix's ("fsdp", "tp") and MaxText's with its twelve axes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses
from distill_jax.errors import InputError
from distill_jax.losses import SampledTargets
from distill_jax.nn import fused_head
from distill_jax.records import sampler
from distill_jax.types import Batch

B, T, D, V, K, CHUNK = 4, 7, 8, 112, 5, 3
MAXTEXT = (
  "data",
  "stage",
  "fsdp",
  "fsdp_transpose",
  "sequence",
  "context",
  "context_autoregressive",
  "tensor",
  "tensor_transpose",
  "tensor_sequence",
  "expert",
  "autoregressive",
)
U_BT = np.full((B, T), 0.3, np.float32)
LOSSES = {"soft": losses.KD(weight=0.7), "hard": losses.CE(weight=0.3, z_loss=0.01)}


def mesh_of(kind=AxisType.Auto, **sizes):
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def maxtext_mesh(**sizes):
  return mesh_of(**{name: sizes.get(name, 1) for name in MAXTEXT})


# mesh, axes of the batch, axes of the vocabulary
FOREIGN = {
  "x y": (lambda: mesh_of(x=2, y=2), ("x",), "y"),
  "all four for the batch": (lambda: mesh_of(x=2, y=2), ("x", "y"), None),
  "all four for the vocabulary": (lambda: mesh_of(x=2, y=2), (), ("x", "y")),
  "tunix": (lambda: mesh_of(fsdp=2, tp=2), ("fsdp",), "tp"),
  "maxtext, our defaults": (lambda: maxtext_mesh(fsdp=2, tensor=2), ("data", "fsdp"), "tensor"),
  "maxtext, its own axes": (
    lambda: maxtext_mesh(fsdp_transpose=2, tensor_transpose=2),
    ("data", "fsdp", "fsdp_transpose", "expert"),
    ("tensor", "tensor_transpose", "tensor_sequence"),
  ),
  "explicit axes, the default of jax.make_mesh": (
    lambda: mesh_of(AxisType.Explicit, x=2, y=2),
    ("x",),
    "y",
  ),
}


@functools.cache
def problem():
  rng = np.random.default_rng(0)
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  hidden, head = f32(rng.normal(size=(B, T, D))), f32(rng.normal(size=(V, D)))
  weight = rng.dirichlet(np.ones(K), (B, T))
  targets = SampledTargets(
    ids_BTK=jnp.asarray(np.argsort(rng.random((B, T, V)), -1)[..., :K]),
    weight_BTK=f32(weight),
    entropy_BT=f32(-(weight * np.log(weight)).sum(-1)),
  )
  labels = jnp.asarray(rng.integers(0, V, (B, T)))
  return (
    hidden,
    head,
    Batch(None, labels, jnp.asarray(rng.random((B, T)) < 0.8), {"teacher": targets}),
  )


def placed(mesh, batch_axes, vocab_axes):
  hidden, head, batch = problem()
  rows = NamedSharding(mesh, P(batch_axes))
  return jax.device_put((hidden, head, batch), (rows, NamedSharding(mesh, P(vocab_axes)), rows))


def loss_and_gradients(hidden_BTD, head_VD, batch, **axes):
  loss = lambda h, w: losses.fused_loss(LOSSES, h, w, batch, chunk=CHUNK, vocab_size=V - 2, **axes)
  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden_BTD, head_VD)


one_device = functools.cache(lambda: jax.device_get(jax.jit(loss_and_gradients)(*problem())))


@pytest.mark.parametrize("name", FOREIGN)
def test_loss_and_gradients_are_those_of_one_device(name):
  make, batch_axes, vocab_axis = FOREIGN[name]
  want = one_device()
  with jax.set_mesh(make()) as _:
    args = placed(make(), batch_axes, vocab_axis)
    axes = {"batch_axes": batch_axes, "vocab_axis": vocab_axis}
    got = jax.jit(lambda *args: loss_and_gradients(*args, **axes))(*args)
  for a, b in zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


@functools.cache
def records_of_one_device(kind):
  return jax.device_get(jax.jit(functools.partial(summarise, kind))(*problem(), U_BT))


def summarise(kind, hidden, head, batch, u, **axes):
  spec = sampler.SamplerSpec(n=5, kind=kind, logp=True, vocab_size=V - 2)
  return sampler.summarise(hidden, head, batch.labels_BT, u, spec, chunk=CHUNK, **axes)


# The names of the axes and the kind of record do not influence one another.
RECORDS = [(name, "sampled") for name in FOREIGN] + [
  ("all four for the vocabulary", "topk"),
  ("maxtext, its own axes", "topk"),
]


@pytest.mark.parametrize("name, kind", RECORDS)
def test_records_are_those_of_one_device(name, kind):
  make, batch_axes, vocab_axis = FOREIGN[name]
  want = records_of_one_device(kind)
  with jax.set_mesh(make()):
    args = placed(make(), batch_axes, vocab_axis)
    u = jax.device_put(U_BT, args[2].mask_BT.sharding)
    axes = {"batch_axes": batch_axes, "vocab_axis": vocab_axis}
    got = jax.jit(functools.partial(summarise, kind, **axes))(*args, u)
  for field, array in want.items():
    if array.dtype == jnp.int32:
      np.testing.assert_array_equal(got[field], array, err_msg=field)
    else:
      np.testing.assert_allclose(got[field], array, rtol=1e-5, atol=1e-5, err_msg=field)


def test_an_axis_that_the_mesh_lacks():
  with jax.set_mesh(mesh_of(fsdp=2, tp=2)):
    with pytest.raises(
      InputError, match="batch_axes is .*; expected axes of the mesh.* lack 'data'"
    ):
      jax.eval_shape(lambda *a: loss_and_gradients(*a, vocab_axis="tp"), *problem())
    with pytest.raises(InputError, match="vocab_axis is 'tensor'; expected .* lack 'tensor'"):
      jax.eval_shape(lambda *a: loss_and_gradients(*a, batch_axes=("fsdp",)), *problem())
    summarise = lambda h, w, b: sampler.summarise(
      h, w, b.labels_BT, b.labels_BT, sampler.SamplerSpec(n=5), chunk=4
    )
    with pytest.raises(InputError, match="batch_axes is .* lack 'data'"):
      jax.eval_shape(summarise, *problem())


def test_sizes_that_do_not_divide():
  hidden, head, batch = problem()
  odd = jax.tree.map(lambda x: x[:3], batch)
  spec = sampler.SamplerSpec(n=5)
  u = jnp.zeros((B, T))
  axes = {"batch_axes": ("x",), "vocab_axis": "y"}
  with jax.set_mesh(mesh_of(x=2, y=2)):
    with pytest.raises(InputError, match="The batch has size 3, and batch_axes .* 2 devices"):
      losses.fused_loss(LOSSES, hidden[:3], head, odd, **axes)
    with pytest.raises(InputError, match="The head has size 111, and vocab_axis 'y' .* 2 devices"):
      sampler.summarise(hidden, head[:111], batch.labels_BT, u, spec, chunk=4, **axes)
    with pytest.raises(InputError, match="The batch has size 3"):
      sampler.summarise(hidden[:3], head, odd.labels_BT, u[:3], spec, chunk=4, **axes)


@pytest.mark.filterwarnings("ignore:.*with mesh.*:DeprecationWarning")
def test_a_mesh_that_traced_code_does_not_see():
  hidden, head, batch = problem()
  with mesh_of(x=2, y=2):
    with pytest.raises(InputError, match="A mesh of 4 devices is set by `with mesh:`"):
      jax.jit(loss_and_gradients)(hidden, head, batch)
    with pytest.raises(InputError, match="Use `with jax.set_mesh"):
      spec = sampler.SamplerSpec(n=5)
      sampler.summarise(hidden, head, batch.labels_BT, hidden[..., 0], spec, chunk=4)
  with mesh_of(x=1):  # one device is one device
    jax.jit(loss_and_gradients)(hidden, head, batch)


def test_explicit_axes_without_fused_loss():
  hidden, head, batch = problem()
  chunk_loss = lambda z, piece: (jnp.sum(z), {})
  with (
    jax.set_mesh(mesh_of(AxisType.Explicit, x=2, y=2)),
    pytest.raises(InputError, match="has Explicit axes .* fused_head works on Auto axes"),
  ):
    fused_head.loss(chunk_loss, hidden, head, batch, CHUNK, batch_axes=("x",), vocab_axis="y")


def test_inside_shard_map():
  """The batch is a part of the whole there: its label count must be given, and is then right."""
  hidden, head, batch = problem()
  specs = {"in_specs": (P("x"), P(), P("x")), "out_specs": P(), "check_vma": False}

  def of_part(hidden, head, batch, **options):
    return losses.fused_loss(LOSSES, hidden, head, batch, chunk=CHUNK, vocab_size=V - 2, **options)

  with jax.set_mesh(mesh_of(x=2, y=2)):
    forgotten = jax.shard_map(of_part, axis_names={"x"}, **specs)
    with pytest.raises(InputError, match="label_count is None; expected .* inside jax.shard_map"):
      jax.jit(forgotten)(hidden, head, batch)

    def mapped_twice(hidden, head, batch):
      return of_part(hidden, head, batch, label_count=1.0, batch_axes=("x",), vocab_axis="y")[0]

    with pytest.raises(InputError, match="jax.shard_map does not map already"):
      jax.jit(jax.shard_map(mapped_twice, axis_names={"x"}, **specs))(hidden, head, batch)

    def right(hidden, head, batch):
      count = jax.lax.psum(jnp.sum(batch.mask_BT), "x")
      options = {"label_count": count, "batch_axes": (), "vocab_axis": "y"}
      return jax.lax.psum(of_part(hidden, head, batch, **options)[0], "x")

    got = jax.jit(jax.shard_map(right, axis_names={"x"}, **specs))(hidden, head, batch)
  want = jax.jit(of_part)(hidden, head, batch)[0]
  np.testing.assert_allclose(got, want, rtol=1e-6)
