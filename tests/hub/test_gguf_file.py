"""The GGUF reader: files written by the gguf package, and errors."""

import dataclasses

import numpy as np
import pytest
from tiny_checkpoints import CONFIG, tensors, write_gguf

from distill_jax.errors import InputError
from distill_jax.hub.gguf_file import GGUFFile
from distill_jax.hub.pretrained import open_model
from distill_jax.models import llama

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_tensors_under_hugging_face_names(quant, tmp_path):
  want = write_gguf(tmp_path / "x.gguf", quant=quant)
  weights = GGUFFile(tmp_path / "x.gguf")
  assert weights.names() == want.keys()
  for name, x in want.items():
    assert weights.shape(name) == x.shape
    got = weights.read(name)
    assert got.dtype == weights.dtype(name) == np.float32
    np.testing.assert_array_equal(got, x, err_msg=name)


def test_slices(tmp_path):
  want = write_gguf(tmp_path / "x.gguf", quant="Q8_0")
  weights = GGUFFile(tmp_path / "x.gguf")
  for name in ("model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"):
    at = (slice(5, 19), slice(3, 30))
    np.testing.assert_array_equal(weights.read(name, at), want[name][at])
  at = (slice(3, 9),)
  np.testing.assert_array_equal(
    weights.read("model.norm.weight", at), want["model.norm.weight"][at]
  )


@pytest.mark.parametrize("tied", [False, True])
def test_config_and_ids(tied, tmp_path):
  c = dataclasses.replace(CONFIG, tie_word_embeddings=tied, rope_theta=130_000.0)
  write_gguf(tmp_path / "x.gguf", c)
  hf = GGUFFile(tmp_path / "x.gguf").config()
  assert llama.Config.from_hf(hf) == c
  assert (hf["bos_token_id"], hf["eos_token_id"]) == (0, 1)


def test_the_tokenizer_of_the_file(tmp_path):
  write_gguf(tmp_path / "x.gguf")
  opened = open_model(str(tmp_path / "x.gguf"))
  assert opened.tokenizer.size() == CONFIG.vocab_size
  assert opened.tokenizer.chat_template == "{{ messages }}"
  assert opened.tokenizer.config["eos_token"] == "<1>"
  from tokenizers import Tokenizer

  own = Tokenizer.from_str(opened.tokenizer.json)
  assert own.encode("BCB<0>").tokens == ["BC", "B", "<0>"]


@pytest.mark.parametrize("cut", [0.5, 0.9, 0.999])
def test_a_truncated_file_raises_before_weights_are_read(cut, tmp_path):
  write_gguf(tmp_path / "x.gguf")
  whole = (tmp_path / "x.gguf").read_bytes()
  (tmp_path / "y.gguf").write_bytes(whole[: int(cut * len(whole))])
  with pytest.raises(InputError, match="truncated or damaged"):
    GGUFFile(tmp_path / "y.gguf")


def test_bytes_after_the_last_tensor_raise(tmp_path):
  """They remain if the size of a tensor is damaged to a smaller one."""
  write_gguf(tmp_path / "x.gguf")
  with (tmp_path / "x.gguf").open("ab") as f:
    f.write(bytes(64))
  with pytest.raises(InputError, match="its tensors end at byte"):
    GGUFFile(tmp_path / "x.gguf")


def test_other_files_raise(tmp_path):
  (tmp_path / "x.gguf").write_bytes(b"GGUF")
  with pytest.raises(InputError, match="too few"):
    GGUFFile(tmp_path / "x.gguf")
  (tmp_path / "x.gguf").write_bytes(b"PK\3\4" + bytes(100))
  with pytest.raises(InputError, match="expected b'GGUF', version 2 or 3"):
    GGUFFile(tmp_path / "x.gguf")


def test_a_huge_count_raises_immediately(tmp_path):
  """The reader of the gguf package would read such an array for hours."""
  head = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
  key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
  for inner in (0, 8, 9, 77):
    array = inner.to_bytes(4, "little") + (2**60).to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(head + key + array + bytes(50))
    with pytest.raises(InputError, match="truncated or damaged"):
      GGUFFile(tmp_path / "x.gguf")


@pytest.mark.parametrize(
  "meta, word",
  [
    ({"llama.expert_count": 8}, "expert_count"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type"),
    ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4"),
  ],
)
def test_unsupported_features_of_a_model_raise(meta, word, tmp_path):
  write_gguf(tmp_path / "x.gguf", meta=meta)
  with pytest.raises(InputError, match=word):
    open_model(str(tmp_path / "x.gguf"))


def test_a_table_of_rope_frequencies_raises(tmp_path):
  weights = tensors() | {"rope_freqs.weight": np.ones(4, np.float32)}
  write_gguf(tmp_path / "x.gguf", weights=weights)
  with pytest.raises(InputError, match="rope_freqs.weight"):
    open_model(str(tmp_path / "x.gguf"))


def test_another_architecture_or_tokenizer_raises(tmp_path):
  write_gguf(tmp_path / "x.gguf")
  whole = (tmp_path / "x.gguf").read_bytes()
  for old, new, word in (
    (b"architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"gpt-7", "has architecture 'gpt-7'"),
    (b"tokenizer.ggml.pre\x08\0\0\0\x06\0\0\0\0\0\0\0smollm", b"frolly", "pre 'frolly'"),
  ):
    assert whole.count(old) == 1
    (tmp_path / "y.gguf").write_bytes(whole.replace(old, old[: -len(new)] + new))
    with pytest.raises(InputError, match=word):
      open_model(str(tmp_path / "y.gguf"))


def test_a_tokenizer_with_more_tokens_than_rows_raises(tmp_path):
  write_gguf(tmp_path / "x.gguf", tokens=CONFIG.vocab_size + 1)
  with pytest.raises(InputError, match="49 tokens, but the model's embedding has 48 rows"):
    open_model(str(tmp_path / "x.gguf"))
