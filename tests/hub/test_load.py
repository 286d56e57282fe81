"""Loading weights into their sharding: values, which slices are read, and errors."""

import dataclasses
import json
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import CONFIG, Counted, tensors, tokenizer_json, write_folder, write_gguf

from distill_jax import config as configs
from distill_jax.errors import InputError
from distill_jax.hub import declared, load, read_shards
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding
from distill_jax.runtime.json_io import write_json
from distill_jax.runtime.progress import Progress

pytestmark = pytest.mark.smoke

HOW = layers.ComputeConfig()
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks so small that each tensor has several, the last of another size."""
  monkeypatch.setattr(declared, "BLOCK", 900)


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def read(path, mesh=None, **kwargs):
  return load.load_model(open_model(str(path)), mesh or one_device(), HOW, **kwargs)


def same(a, b) -> bool:
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_parameters_have_the_declared_layout(tmp_path):
  """Compares with layouts written by hand, from torch's [out, in]."""
  w, m = tensors(), read(write_folder(tmp_path))
  c, at = CONFIG, lambda i, name: w[f"model.layers.{i}.{name}.weight"]
  heads, kv = (c.num_attention_heads, c.head_dim), (c.num_key_value_heads, c.head_dim)
  for i in range(c.num_hidden_layers):
    for ours, theirs, split in (
      (m.layers.q, "self_attn.q_proj", heads),
      (m.layers.k, "self_attn.k_proj", kv),
      (m.layers.v, "self_attn.v_proj", kv),
    ):
      np.testing.assert_array_equal(ours[i], at(i, theirs).T.reshape(c.hidden_size, *split))
    o = at(i, "self_attn.o_proj").T.reshape(*heads, c.hidden_size)
    np.testing.assert_array_equal(m.layers.o[i], o)
    np.testing.assert_array_equal(m.layers.down[i], at(i, "mlp.down_proj").T)
    np.testing.assert_array_equal(m.layers.mlp_norm[i], at(i, "post_attention_layernorm"))
  np.testing.assert_array_equal(m.head[...], w["lm_head.weight"])


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_mesh_and_one_device_load_the_same_values(shape, kind, tmp_path):
  path = tmp_path / "model.gguf"
  if kind == "gguf":
    write_gguf(path, quant="Q8_0")
  else:
    path = write_folder(tmp_path / "model")
  mesh = sharding.make_mesh(*shape)
  there = read(path, mesh)
  assert same(there, read(path))
  want = jax.tree.leaves(sharding.shardings(there, mesh, HOW.rules))
  assert [x.sharding for x in jax.tree.leaves(there)] == want


def test_only_necessary_slices_are_read_and_replicas_once(tmp_path, monkeypatch):
  opened = open_model(str(write_folder(tmp_path)))
  counted, seen = Counted(opened.weights), []

  class Seen(Progress):
    def add(self, n, **numbers):
      super().add(n, **numbers)
      seen.append((self.done, self.total))

  monkeypatch.setattr(load, "Progress", Seen)
  model = load.load_model(
    dataclasses.replace(opened, open_weights=lambda: counted), sharding.make_mesh(2, 1, 2), HOW
  )
  # `data` and an axis that is not sharded replicate: every value is still read once.
  assert counted.values == params.count(model)
  total = 4 * params.count(model)
  assert seen[-1] == (total, total) and {t for _, t in seen} == {total}
  assert [d for d, _ in seen] == sorted(d for d, _ in seen)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(stored, dtype, tmp_path):
  w = {name: x.astype(stored) for name, x in tensors().items()}
  m = read(write_folder(tmp_path, weights=w), dtype=dtype)
  assert {x.dtype for x in jax.tree.leaves(m)} == {np.dtype(dtype)}
  want = w["model.layers.2.mlp.up_proj.weight"].astype(dtype).T
  np.testing.assert_array_equal(np.asarray(m.layers.up[2]), want)


def test_a_student_of_chosen_layers(tmp_path):
  path = write_folder(tmp_path)
  whole, student = read(path), read(path, keep_layers=(3, 0))
  assert student.config == dataclasses.replace(CONFIG, num_hidden_layers=2)
  for a, b in zip(jax.tree.leaves(student.layers), jax.tree.leaves(whole.layers), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b)[[3, 0]])
  np.testing.assert_array_equal(student.embed[...], whole.embed[...])
  with pytest.raises(InputError, match="keep_layers is .*layers from 0 to 3.*Remove layer 4"):
    read(path, keep_layers=(0, 4))


def test_host_memory_is_the_parameters_and_a_few_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr(declared, "BLOCK", 2**16)
  c = dataclasses.replace(
    CONFIG,
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=12,
    tie_word_embeddings=True,
  )
  write_gguf(tmp_path / "x.gguf", c, "Q8_0")
  opened, mesh = open_model(str(tmp_path / "x.gguf")), one_device()
  tracemalloc.start()
  model = load.load_model(opened, mesh, HOW)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  blocks = 2 * 4 * 4 * declared.BLOCK  # two are dequantised at a time, in four steps of float32
  assert peak < 4 * params.count(model) + blocks + 2**20
  # Only memory of numpy is traced. The address shows that jax uses the same memory.
  buffers = [x.addressable_data(0).unsafe_buffer_pointer() for x in jax.tree.leaves(model)]
  assert all(b % 64 == 0 for b in buffers)


def test_aligned_shards_are_not_copied():
  x = read_shards._aligned_empty((3, 5), np.dtype(np.float32))
  assert jax.device_put(x, jax.devices()[0]).unsafe_buffer_pointer() == x.ctypes.data


WEIGHTS = {
  "missing": (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), "layers.2.mlp.up_proj"),
  "unknown": (
    lambda w: w.update(score=np.ones(3, np.float32)),
    "contains score, which its model does not have",
  ),
  "unknown layer": (
    lambda w: w.update({"model.layers.4.mlp.up_proj.weight": w["model.norm.weight"]}),
    "contains model.layers.4.mlp.up_proj.weight",
  ),
  "layer spelled 01": (
    lambda w: w.update({"model.layers.01.mlp.up_proj.weight": w["model.norm.weight"]}),
    "contains model.layers.01.mlp.up_proj.weight",
  ),
  "transposed": (
    lambda w: w.update({"model.layers.0.mlp.up_proj.weight": np.ones((32, 64), np.float32)}),
    r"has shape \(32, 64\); expected \(64, 32\) from config.json",
  ),
  "integers": (
    lambda w: w.update({"model.norm.weight": np.ones(32, np.int32)}),
    "model.norm.weight has dtype int32",
  ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_tensors_that_do_not_fit_raise_with_their_names(case, tmp_path):
  w, (edit, word) = tensors(), WEIGHTS[case]
  edit(w)
  with pytest.raises(InputError, match=word):
    read(write_folder(tmp_path, weights=w))


def test_rotary_buffers_are_ignored(tmp_path):
  w = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  assert same(read(write_folder(tmp_path / "a", weights=w)), read(write_folder(tmp_path / "b")))


def test_a_stored_head_with_tied_embeddings(tmp_path):
  w = tensors(TIED)
  embed = w["model.embed_tokens.weight"]
  equal = write_folder(tmp_path / "a", TIED, w | {"lm_head.weight": embed.copy()})
  assert same(read(equal), read(write_folder(tmp_path / "b", TIED, w)))
  for i, other in enumerate((embed + 1, embed[:-1])):
    path = write_folder(tmp_path / f"c{i}", TIED, w | {"lm_head.weight": other})
    with pytest.raises(InputError, match="ties its embeddings, but its lm_head.weight differs"):
      read(path)


def test_an_untied_model_without_its_head_raises(tmp_path):
  path = write_folder(tmp_path, weights=tensors(TIED))
  with pytest.raises(InputError, match="lacks the tensor lm_head.weight"):
    read(path)


@pytest.mark.parametrize(
  "edit, word",
  [
    ({"model_type": "gpt7"}, "model_type 'gpt7'.*llama"),
    ({"model_type": None}, "model_type None"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"num_attention_heads": None}, "num_attention_heads"),
    ({"rope_parameters": 7}, "wrong type"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "lacks 'factor'"),
    ({"num_hidden_layers": 10**9}, "lacks the tensor"),
  ],
)
def test_a_bad_config_raises(edit, word, tmp_path):
  path = write_folder(tmp_path, hf=CONFIG.to_hf() | edit)
  with pytest.raises(InputError, match=word):
    read(path)


def test_a_config_that_lacks_a_key_raises(tmp_path):
  hf = CONFIG.to_hf()
  del hf["intermediate_size"]
  with pytest.raises(InputError, match="lacks 'intermediate_size'"):
    open_model(str(write_folder(tmp_path, hf=hf)))


def test_a_workdir_is_not_a_model(tmp_path):
  """It has a config.json, too: that of the command."""
  write_json(tmp_path / "config.json", configs.to_dict(configs.Config()))
  with pytest.raises(InputError, match=f"is a workdir, not a model.*name it as run:{tmp_path}"):
    open_model(str(tmp_path))


def test_a_folder_that_is_not_a_model_raises(tmp_path):
  with pytest.raises(InputError, match="does not contain a config.json"):
    open_model(str(tmp_path))
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(InputError, match="neither a Hugging Face folder nor a .gguf"):
    open_model(str(tmp_path / "notes.txt"))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(InputError, match="config.json is not JSON"):
    open_model(str(tmp_path))


def test_vocabulary(tmp_path):
  path = write_folder(tmp_path)
  (path / "tokenizer.json").write_text(tokenizer_json(47))
  assert open_model(str(path)).tokenizer.size() == 47  # a row of padding
  (path / "tokenizer.json").write_text(tokenizer_json(49))
  with pytest.raises(InputError, match="49 tokens, but the model's embedding has 48 rows"):
    open_model(str(path))
  added = json.loads(tokenizer_json(48)) | {"added_tokens": [{"id": 48, "content": "<x>"}]}
  (path / "tokenizer.json").write_text(json.dumps(added))
  with pytest.raises(InputError, match="49 tokens"):
    open_model(str(path))
  (path / "tokenizer.json").write_text("{}")
  with pytest.raises(InputError, match="no vocabulary"):
    open_model(str(path))


def test_a_mesh_that_does_not_divide_a_size_raises(tmp_path):
  c = dataclasses.replace(CONFIG, vocab_size=47)
  with pytest.raises(InputError, match="'vocab' of size 47 is not divisible by 2"):
    read(write_folder(tmp_path, c), sharding.make_mesh(1, 2, 2))


def test_an_integer_dtype_raises(tmp_path):
  with pytest.raises(InputError, match="dtype is 'int8'"):
    read(write_folder(tmp_path), dtype="int8")


def test_the_digest_is_of_the_content(tmp_path):
  a = write_folder(tmp_path / "a")
  shutil.copytree(a, tmp_path / "elsewhere")
  digest = open_model(str(a)).digest
  assert digest == open_model(str(tmp_path / "elsewhere")).digest and len(digest) == 64
  file = tmp_path / "elsewhere" / "model.safetensors"
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  assert open_model(str(tmp_path / "elsewhere")).digest != digest
  other = write_folder(tmp_path / "other", dataclasses.replace(CONFIG, rope_theta=2.0))
  assert open_model(str(other)).digest != digest


def test_sentencepiece_and_templates_of_a_folder(tmp_path):
  path = write_folder(tmp_path)
  (path / "tokenizer_config.json").write_text(
    json.dumps({"chat_template": "A", "eos_token": "</s>"})
  )
  (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "x"}))
  files = open_model(str(path)).tokenizer
  assert files.chat_template == "A"
  assert (files.config["bos_token"], files.config["eos_token"]) == ("<s>", "</s>")
  (path / "chat_template.jinja").write_text("B")
  assert open_model(str(path)).tokenizer.chat_template == "B"
  for name in ("tokenizer.json", "tokenizer_config.json"):
    (path / name).unlink()
  assert open_model(str(path)).tokenizer is None


def test_generation_settings_and_ids(tmp_path):
  path = write_folder(tmp_path, hf=CONFIG.to_hf() | {"eos_token_id": [2, 3], "bos_token_id": 1})
  assert open_model(str(path)).generation == {"eos_token_id": [2, 3], "bos_token_id": 1}
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "top_p": 0.9}))
  want = {"eos_token_id": 5, "bos_token_id": 1, "top_p": 0.9}
  assert open_model(str(path)).generation == want


def test_a_truncated_shard_raises(tmp_path):
  path = write_folder(tmp_path)
  data = (path / "model.safetensors").read_bytes()
  (path / "model.safetensors").write_bytes(data[:-4])
  with pytest.raises(InputError, match="truncated"):
    read(path)
  save_file({"x": np.ones(1)}, path / "model.safetensors")
  with pytest.raises(InputError, match="lacks the tensor"):
    read(path)
