"""Exports of integer weights: the integers come back, and the files are as small as they can be."""

import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import CONFIG

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.hub import export, packed_export, tensors
from distill_jax.hub.pretrained import open_model
from distill_jax.models import llama
from distill_jax.nn import grids, params
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime import checkpoint, saved_arrays

EXTRA = {"tokenizer": None, "generation": {}, "card": "# card\n", "dtype": "float32"}
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight")
INT4, INT4_BY_8, INT8 = QuantiseOptions("int4"), QuantiseOptions("int4", 8), QuantiseOptions("int8")
GRIDS = [INT4, INT4_BY_8, INT8, QuantiseOptions("int8", 16)]


@pytest.fixture(scope="module")
def model():
  """A model with a row of zeros, whose scale is 0."""
  config = dataclasses.replace(CONFIG, num_hidden_layers=2)
  made = jax.jit(lambda key: llama.Model(config, key))(jax.random.key(0))
  up = made.layers.up
  return params.replace(made, {"layers.up": up[...].at[:, :, 3].set(0)})


@pytest.fixture(scope="module")
def floats(model, tmp_path_factory):
  """The tensors of an export in float32."""
  folder = tmp_path_factory.mktemp("float") / "model"
  export.export_model(model, folder, **EXTRA)
  return load_file(folder / "model.safetensors")


def reference(x_RC: np.ndarray, bits: int, group: int):
  """(integers, scales), in float64 except for the scale's two roundings."""
  most = 2 ** (bits - 1) - 1
  grouped = x_RC.astype(np.float64).reshape(len(x_RC), -1, group or x_RC.shape[1])
  scale = (np.abs(grouped).max(-1) / most).astype(np.float32).astype(ml_dtypes.bfloat16)
  wide = np.where(scale > 0, scale.astype(np.float64), 1.0)[..., None]
  q = np.clip(np.round((grouped / wide).astype(np.float32)), -most, most)
  return q.reshape(x_RC.shape).astype(np.int8), scale


@pytest.mark.parametrize("integers", GRIDS)
def test_the_integers_come_back_and_are_small(model, floats, integers, tmp_path):
  export.export_model(model, tmp_path / "out", **EXTRA, integers=integers)
  weights, bits = open_model(str(tmp_path / "out")).weights, int(integers.grid[-1])
  assert weights.names() == floats.keys()
  for name, x in floats.items():
    if not LINEAR.fullmatch(name):
      np.testing.assert_array_equal(weights.read(name), x)
      continue
    q, scale = reference(x, bits, integers.group)
    got_q, got_scale = weights.read_integers(name)
    np.testing.assert_array_equal(got_q, q)
    np.testing.assert_array_equal(got_scale.astype(np.float32), scale.astype(np.float32))
    wide = np.repeat(scale.astype(np.float32), x.shape[1] // scale.shape[1], 1)
    np.testing.assert_array_equal(weights.read(name), q * wide)
  stored = load_file(tmp_path / "out/model.safetensors")
  linear = {n: x for n, x in floats.items() if LINEAR.fullmatch(n)}
  of_scales = sum(x.size // (integers.group or x.shape[1]) for x in linear.values()) * 4
  of_shapes = 0 if integers == INT8 else 16 * len(linear)
  expected = sum(x.nbytes for x in linear.values()) * bits // 32 + of_scales + of_shapes
  assert sum(x.nbytes for n, x in stored.items() if n.startswith(tuple(linear))) == expected


def test_the_files_from_a_checkpoint_are_those_from_memory(model, tmp_path, monkeypatch):
  """Parts, chunks and files are so small that each weight has several."""
  monkeypatch.setattr(tensors, "PART_BYTES", 1500)
  monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 700)
  with checkpoint.manager(tmp_path) as saves:
    checkpoint.save(saves, 1, {"params": model, "step": np.int32(1)}, {})
  options = EXTRA | {"dtype": "bfloat16", "shard_bytes": 4000, "integers": INT4_BY_8}
  export.export_model(model, tmp_path / "a", **options)
  with saved_arrays.open_arrays(tmp_path) as saved:
    export.export_model(jax.eval_shape(lambda: model), tmp_path / "b", saved=saved, **options)
  contents = lambda folder: {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
  assert contents("a") == contents("b") and len(contents("a")) > 5
  index = json.loads(contents("a")["model.safetensors.index.json"])
  assert index["metadata"]["total_parameters"] == params.count(model)
  weights = open_model(str(tmp_path / "a")).weights
  scales = [weights.read_integers(n)[1] for n in weights.names() if LINEAR.fullmatch(n)]
  assert {scale.dtype.name for scale in scales} == {"bfloat16"}


def test_the_config_names_what_is_not_integers():
  deepseek = registry.load("models", "deepseek_v3")
  init = lambda key: deepseek.Model(deepseek.CONFIGS["tiny"], key)
  shapes = jax.eval_shape(init, jax.random.key(0))
  scheme = packed_export.scheme_of(shapes, INT8)
  about = packed_export.quantization_config(shapes, scheme)
  assert about["format"] == "pack-quantized"  # since it has experts
  assert about["config_groups"]["group_0"]["weights"] == {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False
  }  # fmt: skip
  ignored = lambda name: any(re.match(p.removeprefix("re:"), name) for p in about["ignore"])
  for name in ("lm_head", "language_model.lm_head", "model.layers.12.mlp.gate"):
    assert ignored(name)
  for name in ("model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.o_proj"):
    assert not ignored(name)


def test_a_student_has_the_numbers_of_its_training(model, tmp_path, integers=INT4_BY_8):
  """If it was trained on another grid, its numbers on that grid are rounded once more."""

  def weights(folder, **grids):
    export.export_model(model, tmp_path / folder, **EXTRA, **grids)
    opened = open_model(str(tmp_path / folder)).weights
    return {n: opened.read(n) for n in opened.names() if LINEAR.fullmatch(n)}

  trained = weights("float", quantise=integers)
  packed = weights("integers", quantise=integers, integers=integers)
  before = QuantiseOptions("Q8_0")
  expected = lambda x: grids.on_grid(x, integers.grid, integers.group)
  q8_0 = weights("Q8_0", quantise=before)
  twice = weights("twice", quantise=before, integers=integers)
  for name, x in trained.items():
    np.testing.assert_array_equal(packed[name], x)
    np.testing.assert_array_equal(twice[name], expected(q8_0[name]))


def test_a_number_that_is_not_finite_is_refused(model, tmp_path):
  broken = params.replace(model, {"layers.up": model.layers.up[...].at[1, 2, 3].set(np.nan)})
  with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.* contains nan, which cannot"):
    export.export_model(broken, tmp_path / "out", **EXTRA, integers=INT4)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "integers, message",
  [
    (QuantiseOptions("int4", 24), "export.group is 24; expected a divisor of 36, the number of in"),
    (
      INT4,
      "export.quant is 'int4'; expected 'float', because .* has 36 inputs, not",
    ),
  ],
)
def test_what_does_not_fit_is_refused(integers, message, tmp_path):
  config = dataclasses.replace(CONFIG, intermediate_size=36)
  made = jax.eval_shape(lambda key: llama.Model(config, key), jax.random.key(0))
  with pytest.raises(InputError, match=message):
    export.export_model(made, tmp_path / "out", **EXTRA, integers=integers)
  assert not list(tmp_path.iterdir())
