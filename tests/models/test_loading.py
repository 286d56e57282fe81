"""A model's source is opened once, and its weights are read only to load or to hash them."""

import builtins
import dataclasses
import io
import pathlib

import pytest
from tiny import tiny, write_tokenizer
from tiny_checkpoints import CONFIG, write_folder

from distill_jax import config
from distill_jax.commands import record
from distill_jax.errors import InputError
from distill_jax.hub.safetensors_folder import SafetensorsFolder
from distill_jax.models import loading
from distill_jax.nn import params


@pytest.fixture
def opened(monkeypatch):
  """Collects the names of all opened files, in order."""
  names = []
  real = io.open

  def counting(file, *args, **kwargs):
    names.append(pathlib.Path(str(file)).name)
    return real(file, *args, **kwargs)

  monkeypatch.setattr(io, "open", counting)
  monkeypatch.setattr(builtins, "open", counting)
  return names


def test_record_opens_its_teacher_once(tmp_path, opened):
  model = write_folder(tmp_path / "model", dataclasses.replace(CONFIG, vocab_size=256))
  write_tokenizer(model / "tokenizer.json")
  c = tiny(tmp_path)
  c.teacher.source, c.teacher.shape, c.data.tokenizer = str(model), "", ""
  opened.clear()
  record.run(config.resolve(c), tmp_path / "records")
  assert opened.count("config.json") == 1


def test_shape_and_tokenizer_read_no_weights(tmp_path, monkeypatch):
  """This holds even if the config requires a digest."""
  folder = write_folder(tmp_path)

  def refuse(*_):
    raise AssertionError("weights were read")

  monkeypatch.setattr(SafetensorsFolder, "read", refuse)
  monkeypatch.setattr("hashlib.file_digest", refuse)
  source = loading.open_source(config.ModelOptions(source=str(folder), digest="0" * 64))
  assert (source.family, source.config) == ("llama", CONFIG)
  assert source.tokenizer.size() <= CONFIG.vocab_size
  assert source.abstract.embed.shape == (CONFIG.vocab_size, CONFIG.hidden_size)
  assert params.count(source.abstract) > 0
  with pytest.raises(AssertionError, match="weights were read"):
    _ = source.digest


def test_a_layer_that_the_source_lacks_is_reported_with_its_key(tmp_path):
  folder = str(write_folder(tmp_path))
  with pytest.raises(InputError, match=r"^student.keep_layers is \(0, 9\); expected layers"):
    _ = loading.open_source(config.StudentOptions(source=folder, keep_layers=(0, 9))).config
