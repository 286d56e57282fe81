"""Export: other libraries read the same values, and failures leave no files."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from tiny_checkpoints import CONFIG, tensors, torch_shapes, write_folder

from distill_jax.errors import InputError
from distill_jax.hub import declared, export, export_folder, load
from distill_jax.hub.pretrained import open_model
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.hub.weights import FLOATS
from distill_jax.nn import layers, params, sharding

HOW = layers.ComputeConfig()
EXTRA = {"tokenizer": None, "generation": {}, "card": "# card\n"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks so small that each tensor has several, the last of another size."""
  monkeypatch.setattr(declared, "BLOCK", 900)


def model_of(folder, mesh=None):
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  return load.load_model(open_model(str(folder)), mesh, HOW)


@pytest.fixture
def model(tmp_path):
  return model_of(write_folder(tmp_path / "source"))


def export_model(model, to, **kwargs):
  export.export_model(model, to, **kwargs)
  return to


def stored(folder) -> dict[str, np.ndarray]:
  """Reads the tensors with the safetensors library."""
  out = {}
  for f in sorted(folder.glob("*.safetensors")):
    with safe_open(f, "numpy") as s:
      assert s.metadata() == {"format": "pt"}
      out |= {name: s.get_tensor(name) for name in s.keys()}  # noqa: SIM118
  return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_read_back_bit_for_bit(dtype, model, tmp_path):
  out = export_model(model, tmp_path / "out", dtype=dtype, **EXTRA)
  got, want = stored(out), tensors()
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x.astype(FLOATS[dtype]), err_msg=name)
  hf = json.loads((out / "config.json").read_text())
  assert hf["dtype"] == hf["torch_dtype"] == dtype


@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "float16"])
def test_import_and_export_give_the_same_folder(stored_as, tmp_path):
  w = {name: x.astype(FLOATS[stored_as]) for name, x in tensors().items()}
  source = write_folder(tmp_path / "source", weights=w)
  opened = open_model(str(source))
  out = export_model(
    model_of(source),
    tmp_path / "out",
    tokenizer=opened.tokenizer,
    dtype=stored_as,
    generation=opened.generation,
    card="",
  )
  got = stored(out)
  assert got.keys() == w.keys()
  assert all(got[n].dtype == x.dtype and got[n].tobytes() == x.tobytes() for n, x in w.items())
  again = open_model(str(out))
  assert (again.config, again.tokenizer) == (opened.config, opened.tokenizer)


def test_from_a_mesh(model, tmp_path):
  sharded = model_of(tmp_path / "source", sharding.make_mesh(1, 2, 2))
  a = export_model(model, tmp_path / "a", dtype="float32", **EXTRA)
  b = export_model(sharded, tmp_path / "b", dtype="float32", **EXTRA)
  name = "model.safetensors"
  assert (a / name).read_bytes() == (b / name).read_bytes()


def test_shards_and_their_index(model, tmp_path):
  limit = 30_000
  out = export_model(model, tmp_path / "out", dtype="bfloat16", shard_bytes=limit, **EXTRA)
  index = json.loads((out / "model.safetensors.index.json").read_text())
  files = sorted(p.name for p in out.glob("*.safetensors"))
  assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  assert set(index["weight_map"].values()) == set(files)
  for f in files:
    with safe_open(out / f, "numpy") as s:
      assert {n for n, where in index["weight_map"].items() if where == f} == set(s.keys())
      assert sum(2 * s.get_tensor(n).size for n in s.keys()) <= limit  # noqa: SIM118
  assert index["metadata"]["total_size"] == 2 * params.count(model)
  assert stored(out).keys() == torch_shapes(CONFIG).keys()


def test_one_shard_a_tensor(model, tmp_path):
  out = export_model(model, tmp_path / "out", shard_bytes=1, **EXTRA)
  assert len(list(out.glob("*.safetensors"))) == len(torch_shapes(CONFIG))


def test_the_files_other_than_weights(model, tmp_path):
  files = TokenizerFiles('{"é": 1}', b"\0pieces", {"chat_template": "T", "eos_token": "</s>"})
  generation = {"eos_token_id": [1, 2], "pad_token_id": 0, "top_p": 0.9}
  out = export_model(
    model, tmp_path / "out", tokenizer=files, generation=generation, card="# Ünïcode"
  )
  text = lambda name: (out / name).read_text(encoding="utf-8")
  assert text("tokenizer.json") == '{"é": 1}'
  assert (out / "tokenizer.model").read_bytes() == b"\0pieces"
  assert json.loads(text("tokenizer_config.json")) == files.config
  assert json.loads(text("generation_config.json")) == generation
  assert text("README.md") == "# Ünïcode"
  hf = json.loads(text("config.json"))
  assert (hf["eos_token_id"], hf["pad_token_id"]) == ([1, 2], 0) and "top_p" not in hf
  assert hf["model_type"] == "llama" and hf["vocab_size"] == CONFIG.vocab_size


def test_an_existing_folder_raises(model, tmp_path):
  (tmp_path / "out").mkdir()
  with pytest.raises(InputError, match="export does not overwrite"):
    export_model(model, tmp_path / "out", **EXTRA)
  assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("at", ["_write_shard", "_finish"])
def test_a_failure_leaves_no_files(at, model, tmp_path, monkeypatch):
  def fail(*args):
    raise OSError("no space left")

  monkeypatch.setattr(export_folder, at, fail)
  before = list(tmp_path.iterdir())
  with pytest.raises(OSError, match="no space"):
    export_model(model, tmp_path / "out", **EXTRA)
  assert list(tmp_path.iterdir()) == before


def test_a_full_disk_raises_before_writing(model, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(InputError, match="the disk has only 1,000 bytes free"):
    export_model(model, tmp_path / "out", **EXTRA)
  assert not (tmp_path / "out").exists()


def test_values_too_large_for_float16_raise(model, tmp_path):
  model.norm = model.norm.replace(model.norm[...].at[3].set(70_000.0))
  with pytest.raises(
    InputError, match="model.norm.weight contains 7e.04, but the maximum of float16"
  ):
    export_model(model, tmp_path / "out", dtype="float16", **EXTRA)
  assert not (tmp_path / "out").exists()
  export_model(model, tmp_path / "out", dtype="bfloat16", **EXTRA)


@pytest.mark.parametrize("wrong, word", [({"dtype": "int4"}, "int4"), ({"shard_bytes": 0}, "is 0")])
def test_wrong_arguments_raise(wrong, word, model, tmp_path):
  with pytest.raises(InputError, match=word):
    export_model(model, tmp_path / "out", **EXTRA, **wrong)


def test_bfloat16_parameters_are_exported_exactly(model, tmp_path):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
  got = stored(export_model(half, tmp_path / "out", dtype="float32", **EXTRA))
  for name, x in tensors().items():
    np.testing.assert_array_equal(got[name], x.astype(ml_dtypes.bfloat16).astype(np.float32))
