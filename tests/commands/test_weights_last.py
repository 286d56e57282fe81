"""Source weights are read last, and only if they are needed: a shape or a tokenizer reads none."""

import jax
import numpy as np
import pytest
import tiny
from tiny_run import record, train

import distill_jax as dj
from distill_jax import config
from distill_jax.commands import export
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import params, sharding
from distill_jax.records import collate


@pytest.fixture
def source(tmp_path):
  """A folder with a tiny model, whose weights a test can delete."""
  folder = tmp_path / "source"
  dj.export_model(dj.load_model(family="llama", shape="tiny"), folder, dtype="float32")
  tiny.write_tokenizer(folder / "tokenizer.json")
  return folder


def without_weights(source):
  (source / "model.safetensors").unlink()
  return source


def test_a_store_of_text_needs_a_tokenizer_only(source, tmp_path):
  c = tiny.tiny(tmp_path)
  c.teacher.source, c.data.tokenizer = str(without_weights(source)), ""
  c.records.kind = "text"
  assert record(c, tmp_path / "text")["sequences"] == 20
  c.records.kind = "sampled"
  with pytest.raises(InputError, match="contains neither model.safetensors"):
    record(c, tmp_path / "sampled")


def test_shapes_and_sizes_need_no_weights(source):
  opened = loading.open_source(ModelOptions(source=str(without_weights(source))))
  assert params.count(opened.abstract) > 0 and opened.tokenizer is not None
  with pytest.raises(InputError, match="contains neither model.safetensors"):
    _ = opened.digest


def test_a_resumed_run_and_its_export_read_no_source_weights(tiny_run, source, tmp_path):
  c = tiny.tiny(tiny_run)
  c.student.source, c.student.shape = str(source), ""
  train(c, tmp_path / "whole")
  real, seen = collate.to_device, []

  def power_cut(batch, *args, **kwargs):
    seen.append(batch)
    if len(seen) == 5:
      raise KeyboardInterrupt
    return real(batch, *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(collate, "to_device", power_cut)
    with pytest.raises(KeyboardInterrupt):
      train(c, tmp_path / "stopped")
  without_weights(source)
  train(c, tmp_path / "stopped")
  mesh = sharding.make_mesh()
  models = []
  for name in ("whole", "stopped"):
    run = loading.open_run(tmp_path / name)
    models.append(run.load(mesh, run.student.compute))
  for a, b in zip(*map(jax.tree.leaves, models), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  c.export.dir = str(tmp_path / "exported")
  export.run(config.resolve(c), tmp_path / "stopped")
  assert (tmp_path / "exported/model.safetensors").exists()


def test_the_weights_of_a_new_run_are_needed(tiny_run, source, tmp_path):
  c = tiny.tiny(tiny_run)
  c.student.source, c.student.shape = str(without_weights(source)), ""
  with pytest.raises(InputError, match="contains neither model.safetensors"):
    train(c, tmp_path / "run")
