"""Parameters that are read once and resharded: equal to those read in place, and no byte twice."""

import dataclasses

import jax
import numpy as np
import pytest
import slow
from tiny_checkpoints import CONFIG, Counted, write_folder

from distill_jax import registry
from distill_jax.hub import load, read_once
from distill_jax.hub.export import export_model
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding

pytestmark = pytest.mark.smoke

HOW = layers.ComputeConfig()


def loaded(source, mesh, **kwargs):
  """Returns the model, and the values that were read."""
  opened = open_model(str(source))
  counted = Counted(opened.weights)
  opened = dataclasses.replace(opened, open_weights=lambda: counted)
  return load.load_model(opened, mesh, HOW, **kwargs), counted.values


def check_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.sharding == y.sharding and x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
  "family, shape",
  [
    slow.param("llama", "tiny"),
    slow.param("qwen3", "tiny-moe"),  # experts, sharded over `tensor`
    ("deepseek_v3", "tiny"),  # also layers that do not start at 0, and parameters in float32
    slow.param("clip", "tiny"),  # a single number, and a convolution
  ],
)
def test_values_are_read_once_and_equal_those_read_in_place(family, shape, tmp_path, monkeypatch):
  module = registry.load("models", family)
  model = jax.jit(lambda key: module.Model(module.CONFIGS[shape], key))(jax.random.key(0))
  export_model(
    model,
    tmp_path / "m",
    tokenizer=None,
    generation={},
    card="",
    dtype="float32",
    shard_bytes=100_000,
  )
  for part, piece in ((2**29, 2**23), (20_000, 300)):
    monkeypatch.setattr(read_once, "PART", part)
    monkeypatch.setattr(read_once, "PIECE", piece)
    # Three devices divide hardly any number of rows.
    for mesh in (sharding.make_mesh(1, 2, 2), sharding.make_mesh(3, devices=jax.devices()[:3])):
      ours, values = loaded(f"file://{tmp_path}/m", mesh)
      assert values == params.count(model)
      check_same(ours, loaded(tmp_path / "m", mesh)[0])


def test_chosen_layers_in_bfloat16(tmp_path, monkeypatch):
  monkeypatch.setattr(read_once, "PART", 5000)
  folder, mesh = write_folder(tmp_path / "m"), sharding.make_mesh(1, 2, 2)
  options = {"keep_layers": (3, 0, 2), "dtype": "bfloat16"}
  ours, values = loaded(f"file://{folder}", mesh, **options)
  want, _ = loaded(folder, mesh, **options)
  assert values == params.count(want)
  check_same(ours, want)


def test_a_sharded_axis_of_layers_is_one_part(monkeypatch):
  """XLA would gather a parameter to update a part of a sharded axis."""
  model = jax.eval_shape(
    lambda key: registry.load("models", "llama").Model(CONFIG, key), jax.random.key(0)
  )
  mesh = sharding.make_mesh(2, 2, 1)
  monkeypatch.setattr(read_once, "PART", 1)
  for rules, count in ((sharding.Rules(), 4), (sharding.rules({"layers": ("data", "")}), 1)):
    places = sharding.shardings(model, mesh, rules)
    place = places.layers.mlp_norm.get_value()
    parts = read_once._parts(model.layers.mlp_norm, place, np.dtype(np.float32))
    assert len(list(parts)) == count


def test_no_device_gathers_a_parameter():
  """The temporary memory of the move is a few times a device's share of a part."""
  place = jax.sharding.NamedSharding(
    sharding.make_mesh(1, 2, 2), jax.sharding.PartitionSpec(None, "fsdp", "tensor")
  )
  rows = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(sharding.MESH_AXES))
  move = read_once._mover((1,), (512, 256), (1, 0), place, False)
  into = jax.ShapeDtypeStruct((64, 256, 512), np.float32, sharding=place)
  part = jax.ShapeDtypeStruct((512, 256), np.float32, sharding=rows)
  memory = move.lower(into, part, 0).compile().memory_analysis()
  share = 512 * 256 * 4 // 4
  assert memory.temp_size_in_bytes <= 3 * share
  assert memory.alias_size_in_bytes == 64 * share  # the parameter is updated in place
