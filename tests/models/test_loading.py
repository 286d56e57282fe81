"""A model's source is opened once, and its weights are read only to load or to hash them."""

import pytest
from hub_tiny import CONFIG, write_folder

from distill_jax import config
from distill_jax.hub.safetensors_folder import SafetensorsFolder
from distill_jax.models import loading
from distill_jax.nn import params


def test_shape_and_tokenizer_read_no_weights(tmp_path, monkeypatch):
  """Not even where the config names the digest that the weights must have."""
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
