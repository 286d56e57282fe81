"""GGUF files: read back by the gguf package, streamed, split, and what is refused."""

import itertools
import json

import gguf
import gguf_models
import jax
import numpy as np
import pytest

from distill_jax.errors import InputError
from distill_jax.hub import gguf_export, gguf_file, tensors
from distill_jax.hub.gguf_architectures import architecture
from distill_jax.hub.gguf_file import GGUFFile
from distill_jax.hub.gguf_tensors import Numbers, encode
from distill_jax.hub.pretrained import open_model
from distill_jax.hub.tensors import InMemory, tensors_of
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.models import _rope, llama
from distill_jax.nn import grids
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime import checkpoint, saved_arrays

CASES = ("llama", "qwen3_moe", "gemma3", "deepseek")
SMALL = {"num_hidden_layers": 2}


def read(path):
  """Returns (metadata, tensors) of a file, as the gguf package reads it."""
  reader = gguf.GGUFReader(path)
  meta = {key: field.contents() for key, field in reader.fields.items()}
  return meta, {t.name: t for t in reader.tensors}


def stored(model) -> dict[str, np.ndarray]:
  """Returns the tensors of the Hugging Face checkpoint, in float32."""
  every = tensors_of(model, np.dtype(np.float32))
  return {t.name: t.to_stored(np.asarray(t.param[...])[t.loop_index]) for t in every}


@pytest.fixture(scope="module")
def models():
  return {case: gguf_models.model(case, **SMALL) for case in CASES}


def test_a_llama_is_read_back_exactly(models, tmp_path):
  """The file is read like one of llama.cpp's converter, which has no config of this project."""
  path = gguf_models.export(models["llama"], tmp_path)
  key = gguf_file.CONFIG.encode()
  path.write_bytes(path.read_bytes().replace(key, key[::-1]))
  file, want = GGUFFile(path), stored(models["llama"])
  assert file.names() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(file.read(name), x, err_msg=name)
  assert llama.Config.from_hf(file.config()) == models["llama"].config
  assert (tmp_path / "out-F32/README.md").read_text() == "# card\n"


def test_an_export_prints_what_llama_cpp_does_differently(models, tmp_path, capsys):
  parsed = json.loads(gguf_models.tokenizer().json) | {"normalizer": {"type": "NFC"}}
  composing = TokenizerFiles(json.dumps(parsed), None, {})
  gguf_models.export(models["llama"], tmp_path, tokenizer=composing)
  assert capsys.readouterr().err.count("it does not compose characters") == 1


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_opened_again(case, models, tmp_path):
  path, want = gguf_models.export(models[case], tmp_path), stored(models[case])
  opened = open_model(str(path))
  assert opened.config == models[case].config and opened.generation == {"eos_token_id": 1}
  file = opened.open_weights()
  assert file.names() == want.keys()
  for name, x in want.items():
    # Gemma's norms are multiplied, and have 1 added and subtracted: a rounding each.
    atol = 3e-7 if case == "gemma3" and "norm" in name else 0
    np.testing.assert_allclose(file.read(name), x, rtol=0, atol=atol, err_msg=name)
    assert file.shape(name) == x.shape
    at = tuple(slice(n // 5, n // 2) for n in x.shape)
    np.testing.assert_array_equal(file.read(name, at), file.read(name)[at], err_msg=name)


def test_a_config_that_differs_from_the_metadata_is_damaged(models, tmp_path):
  path = gguf_models.export(models["llama"], tmp_path)
  changed = path.read_bytes().replace(b'"rope_theta": 10000.0', b'"rope_theta": 20000.0')
  path.write_bytes(changed)
  with pytest.raises(InputError, match=r"llama\.rope\.freq_base is 10000\.0, but .* 20000\.0"):
    GGUFFile(path)


@pytest.mark.parametrize("quant", grids.GGUF)
def test_the_integers_of_training_are_in_the_file(quant, models, tmp_path):
  """Bit for bit, also if a student was trained on this grid; permuted rows and experts included."""
  for case, name, parts in (
    ("llama", "attn_k.weight", ["self_attn.k_proj"]),
    ("qwen3_moe", "ffn_down_exps.weight", [f"mlp.experts.{i}.down_proj" for i in range(8)]),
  ):
    (folder := tmp_path / name).mkdir()
    path = gguf_models.export(models[case], folder, quant, trained=QuantiseOptions(quant))
    found = read(path)[1][f"blk.1.{name}"]
    want = np.stack([stored(models[case])[f"model.layers.1.{part}.weight"] for part in parts])
    if name == "attn_k.weight":  # element i of a half of a head becomes element 2 i or 2 i + 1
      order = [32 * h + 16 * (j % 2) + j // 2 for h in range(2) for j in range(32)]
      want = want[:, order]
    q, scale = (np.asarray(a) for a in jax.jit(grids.encode, static_argnums=1)(want, quant))
    blocks = found.data.reshape(-1, gguf.GGML_QUANT_SIZES[found.tensor_type][1])
    got = blocks[:, 2:].view(np.int8)
    if quant == "Q4_0":
      got = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.int8) - 8
    np.testing.assert_array_equal(got.reshape(q.shape), q)
    np.testing.assert_array_equal(blocks[:, :2].copy().view(np.float16).reshape(scale.shape), scale)


def test_another_grid_of_training_comes_first(models):
  """A student that was trained on int4 has its trained numbers, in float16."""
  _, planned = gguf_export.plan(
    models["llama"], Numbers("F16", "F16", trained=QuantiseOptions("int4", 32))
  )
  found = next(t for t in planned if t.name == "blk.0.ffn_up.weight")
  got = np.concatenate([part for part in tensors.parts(InMemory(), [found], {}) if part.size])
  want = stored(models["llama"])["model.layers.0.mlp.up_proj.weight"]
  want = np.asarray(jax.jit(grids.on_grid, static_argnums=(1, 2))(want, "int4", 32))
  np.testing.assert_array_equal(got.view(np.float16).reshape(want.shape), want.astype(np.float16))


def test_tensors_that_llama_cpp_stores_differently(models, tmp_path):
  want = stored(models["gemma3"])
  _, got = read(gguf_models.export(models["gemma3"], tmp_path))
  at = "model.layers.1."
  norm = got["blk.1.post_attention_norm.weight"].data
  np.testing.assert_array_equal(norm, 1 + want[f"{at}post_attention_layernorm.weight"])
  # llama.cpp divides scores by sqrt(head_dim), this model by sqrt(24).
  query = (1 + want[f"{at}self_attn.q_norm.weight"]) * np.sqrt(32 / 24)
  np.testing.assert_allclose(got["blk.1.attn_q_norm.weight"].data, query, rtol=2e-7)

  want = stored(models["deepseek"])[f"{at}self_attn.kv_b_proj.weight"]  # [4 heads x 64, 64]
  _, got = read(gguf_models.export(models["deepseek"], tmp_path, "F16"))
  k, v = (got[f"blk.1.attn_{kind}_b.weight"].data for kind in "kv")
  for head in range(4):
    rows = want[64 * head : 64 * (head + 1)].astype(np.float16)
    np.testing.assert_array_equal(k[head], rows[:32].T)
    np.testing.assert_array_equal(v[head], rows[32:])


def test_the_types_of_the_tensors(models, tmp_path):
  widths = {"blk.1.ffn_gate.weight": "Q8_0"}
  path = gguf_models.export(models["llama"], tmp_path, "Q4_0", widths=widths)
  meta, found = read(path)
  kinds = {name: t.tensor_type.name for name, t in found.items()}
  assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
  assert kinds["blk.1.ffn_gate.weight"] == "Q8_0" and kinds["blk.0.ffn_gate.weight"] == "Q4_0"
  assert {kinds[n] for n in kinds if "norm" in n} == {"F32"}
  assert meta["general.architecture"] == "llama" and meta["general.file_type"] == 2
  _, found = read(gguf_models.export(models["deepseek"], tmp_path, "Q8_0"))
  for name in ("ffn_gate_inp.weight", "exp_probs_b.bias", "attn_k_b.weight", "attn_v_b.weight"):
    assert found[f"blk.1.{name}"].tensor_type.name == "F32"
  assert found["blk.1.ffn_up_exps.weight"].tensor_type.name == "Q8_0"


ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(a DeepSeek of one layer, the folder of its checkpoint)."""
  model, folder = gguf_models.model("deepseek", **ONE_LAYER), tmp_path_factory.mktemp("run")
  with checkpoint.manager(folder) as saves:
    checkpoint.save(saves, 1, {"params": model, "step": np.int32(1)}, {})
  return model, folder


def test_from_a_checkpoint_by_slices(run, monkeypatch, tmp_path):
  """The same bytes as from memory, though the matrix of the latents has two parts."""
  model, folder = run
  whole = gguf_models.export(model, tmp_path, "Q8_0").read_bytes()
  monkeypatch.setattr(tensors, "PART_BYTES", 4 * 64 * 128)  # two of four heads
  (tmp_path / "b").mkdir()
  shapes = gguf_models.shapes("deepseek", **ONE_LAYER)
  with saved_arrays.open_arrays(folder) as saved:
    path = gguf_models.export(shapes, tmp_path / "b", "Q8_0", saved=saved)
  assert path.read_bytes() == whole


@pytest.mark.parametrize("wrong", [0, 1])
def test_every_reading_of_a_matrix_is_checked(wrong, run, monkeypatch, tmp_path):
  """The matrix of the latents is read twice, and its checksum is compared for both."""
  read_slice, readings = saved_arrays.SavedArrays.start_reading, itertools.count()

  def flipped(self, path, index, sums):
    finish = read_slice(self, path, index, sums)
    if path != "layers.kv_up" or next(readings) != wrong:
      return finish

    def changed():
      x = finish()
      sums[path] = [n + 1 for n in sums[path]]
      return x

    return changed

  monkeypatch.setattr(saved_arrays.SavedArrays, "start_reading", flipped)
  shapes = gguf_models.shapes("deepseek", **ONE_LAYER)
  with (
    saved_arrays.open_arrays(run[1]) as saved,
    pytest.raises(InputError, match=r"checkpoints/1 is damaged .*layers\.kv_up"),
  ):
    gguf_models.export(shapes, tmp_path, saved=saved)


def test_large_files_are_split(models, tmp_path):
  whole = read(gguf_models.export(models["llama"], tmp_path))[1]
  (tmp_path / "b").mkdir()
  gguf_models.export(models["llama"], tmp_path / "b", split_bytes=150_000)
  paths = sorted((tmp_path / "b/out-F32").glob("*.gguf"))
  assert [p.name for p in paths][:1] == [f"model-F32-00001-of-{len(paths):05d}.gguf"]
  assert len(paths) > 3
  seen = {}
  for i, path in enumerate(paths):
    meta, some = read(path)
    assert (meta["split.no"], meta["split.count"]) == (i, len(paths))
    assert meta["split.tensors.count"] == len(whole)
    assert ("llama.block_count" in meta) == (i == 0)
    seen |= some
  assert seen.keys() == whole.keys()
  for name, t in whole.items():
    np.testing.assert_array_equal(seen[name].data, t.data)


def refused(case, quant="F32", embedding="F32", **changes):
  with pytest.raises(InputError) as error:
    gguf_export.plan(gguf_models.shapes(case, **changes), Numbers(quant, embedding))
  return str(error.value)


def test_what_llama_cpp_lacks_is_refused():
  wide = {"num_attention_heads": 2, "head_dim": 16}
  yarn = _rope.Yarn(4.0, 64)
  for case, changes, word in (
    ("qwen2", wide, "narrower or wider than hidden_size"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
    ("qwen3", {"rope_scaling": _rope.Llama3(8.0, 1.0, 4.0, 64)}, "the rope scaling 'llama3'"),
    ("qwen3", {"rope_scaling": _rope.Yarn(4.0, 64, truncate=False)}, "truncate false"),
    ("gemma3", {"rope_scaling": yarn}, "the rope scaling 'yarn'"),
    (
      "gemma3",
      {"layer_types": ("full_attention", "sliding_attention", "sliding_attention")},
      "layers with windows in the order",
    ),
    ("deepseek", {"rope_scaling": yarn}, "mscale and mscale_all_dim"),
    ("deepseek", {"rope_scaling": _rope.Linear(4.0)}, "the rope scaling 'linear'"),
    ("deepseek", {"q_lora_rank": None}, "q_lora_rank None"),
    ("deepseek", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
    ("deepseek", {"rope_interleave": False}, "rope_interleave false"),
  ):
    assert word in refused(case, **changes)


def test_other_families_and_widths_are_refused(tmp_path):
  with pytest.raises(InputError, match="expected 'hf', because llama.cpp knows .* not 'bert'"):
    architecture({"model_type": "bert"})
  assert "do not divide the 72 inputs of blk.0.ffn_down.weight" in refused(
    "llama", "Q4_0", intermediate_size=72
  )
  message = refused("llama", "F16", "Q8_0", hidden_size=72)
  assert message.startswith("export.embedding is 'Q8_0'") and "output.weight" in message
  assert "export.quant is 'Q5_K'" in refused("llama", "Q5_K")
  other = Numbers("F16", "F16", {"blk.7.ffn_up.weight": "Q8_0"})
  with pytest.raises(InputError, match=r"has no linear weight blk\.7\.ffn_up\.weight"):
    gguf_export.plan(gguf_models.shapes("llama"), other)
  with pytest.raises(InputError, match="contains the tokenizer, but this student has none"):
    gguf_models.export(gguf_models.shapes("llama"), tmp_path, tokenizer=None)


def test_windows_limit_the_context():
  """llama.cpp has no windows in the architecture llama; within one, the numbers agree."""
  hf = gguf_models.config("mistral").to_hf()
  assert architecture(hf).metadata["context_length"] == 48


@pytest.mark.parametrize("value", [1e5, np.nan, -np.inf])
def test_numbers_that_a_type_cannot_hold_are_refused(value):
  x = np.full((2, 32), 0.5, np.float32)
  x[1, 3] = value
  with pytest.raises(InputError, match="blk.0.x contains .* but the maximum of F16 is 65504"):
    encode(x, "F16", "blk.0.x")
