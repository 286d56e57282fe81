"""Draft models: the teacher's tokens, and as many rows."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from tiny_checkpoints import CONFIG

from distill_jax import config
from distill_jax.commands import export
from distill_jax.deployment import draft
from distill_jax.errors import InputError
from distill_jax.hub import export as hub_export
from distill_jax.hub import gguf_export, table_rows, tensors
from distill_jax.hub.gguf_tensors import Numbers
from distill_jax.hub.weights import hf_json
from distill_jax.models import bert, llama
from distill_jax.runtime import checkpoint, saved_arrays

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def model():
  untied = dataclasses.replace(CONFIG, tie_word_embeddings=False)
  return jax.jit(lambda key: llama.Model(untied, key))(jax.random.key(0))


def write_as_draft(model, rows, to, **kwargs):
  """Returns the tensors of an export with another number of rows."""
  write = functools.partial(
    hub_export.export_model, target=to, tokenizer=None, generation={}, card="", dtype="float32"
  )
  draft.with_rows_of(rows, write)(model, **kwargs)
  assert json.loads((to / "config.json").read_text())["vocab_size"] == rows
  return load_file(to / "model.safetensors")


def test_new_rows_are_the_mean_of_the_others(model, tmp_path):
  mine, written = model.config.vocab_size, write_as_draft(model, 60, tmp_path / "draft")
  for name, param in zip(TABLES, (model.embed, model.head), strict=True):
    table_VD = np.asarray(param[...])
    np.testing.assert_array_equal(written[name][:mine], table_VD)
    mean_D = table_VD.astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(written[name][mine:], np.tile(mean_D, (60 - mine, 1)))
  others = {n: t.shape for n, t in written.items() if n not in TABLES}
  plain = {t.name: t.shape for t in tensors.tensors_of(model, np.dtype(np.float32))}
  assert others == {n: shape for n, shape in plain.items() if n not in TABLES}


@pytest.mark.parametrize("rows", [60, 40])
def test_from_a_checkpoint_by_slices(rows, model, tmp_path, monkeypatch):
  whole = write_as_draft(model, rows, tmp_path / "memory")
  with checkpoint.manager(tmp_path) as saves:
    checkpoint.save(saves, 1, {"params": model, "step": np.int32(1)}, {})
  monkeypatch.setattr(tensors, "PART_BYTES", 1500)  # several parts
  monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 700)
  with saved_arrays.open_arrays(tmp_path) as saved:
    parts = write_as_draft(jax.eval_shape(lambda: model), rows, tmp_path / "parts", saved=saved)
  assert list(parts) == list(whole)
  for name, tensor in whole.items():
    np.testing.assert_array_equal(parts[name], tensor)
  np.testing.assert_array_equal(whole[TABLES[1]][:40], np.asarray(model.head[...])[:40])


@pytest.mark.parametrize("rows", [60, 40])
def test_in_a_gguf_file(rows, model, tmp_path, monkeypatch):
  whole = write_as_draft(model, rows, tmp_path / "hf")
  with checkpoint.manager(tmp_path) as saves:
    checkpoint.save(saves, 1, {"params": model, "step": np.int32(1)}, {})
  monkeypatch.setattr(tensors, "PART_BYTES", 1500)  # several parts, some without rows
  monkeypatch.setattr(gguf_export, "vocabulary", lambda *_: [])
  monkeypatch.setattr(gguf_export, "differences", lambda *_: [])
  numbers = Numbers("Q8_0", "Q8_0")
  write = functools.partial(
    gguf_export.export_gguf, tokenizer="files", generation={}, card="", numbers=numbers
  )
  with saved_arrays.open_arrays(tmp_path) as saved:
    abstract = jax.eval_shape(lambda: model)
    draft.with_rows_of(rows, write)(abstract, target=tmp_path / "gguf", saved=saved)
  (path,) = (tmp_path / "gguf").glob("*.gguf")
  stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
  for ours, hf in zip(("token_embd.weight", "output.weight"), TABLES, strict=True):
    expected = gguf.quants.quantize(whole[hf], gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(stored[ours].data, expected)


def test_a_new_token_is_never_the_most_probable():
  """In a model whose logits are all negative, where rows of zeros would be."""
  rng = np.random.default_rng(0)
  x_D = rng.normal(size=16)
  head_VD = rng.normal(size=(40, 16)) - 3 * x_D
  starts = [lambda part=part: lambda: part for part in np.split(head_VD, [7, 21])]
  parts = [start()() for start in table_rows.resized(starts, 40, 50)]
  logits_V = np.concatenate(parts) @ x_D
  assert logits_V.shape == (50,)
  assert logits_V.max() < 0
  assert logits_V[40:].max() < logits_V[:40].max()
  p_V = np.exp(logits_V)
  assert p_V[40:].sum() / p_V[:40].sum() <= 10 / 40  # Jensen's inequality


@pytest.fixture(scope="module")
def teacher(tiny_run, tmp_path_factory):
  """A folder of a teacher with 8 rows more than tokens, without weights."""
  folder = tmp_path_factory.mktemp("draft") / "teacher"
  folder.mkdir()
  shutil.copy(tiny_run / "tokenizer.json", folder)
  wider = dataclasses.replace(llama.TINY, vocab_size=264)
  (folder / "config.json").write_bytes(hf_json(wider.to_hf()))
  return folder


def draft_config(tiny_run, teacher, to):
  c = tiny.tiny(tiny_run)
  c.teacher.source, c.teacher.shape = str(teacher), ""
  c.export.dir, c.export.draft, c.export.dtype = str(to), True, "float32"
  return c


def test_export(tiny_run, teacher, tmp_path):
  c = draft_config(tiny_run, teacher, tmp_path / "draft")
  export.run(config.resolve(c), tiny_run / "whole")
  assert json.loads((tmp_path / "draft" / "config.json").read_text())["vocab_size"] == 264
  written = load_file(tmp_path / "draft" / "model.safetensors")
  assert written["model.embed_tokens.weight"].shape == (264, 32)
  assert "A draft of the teacher" in (tmp_path / "draft" / "README.md").read_text()
  c.export.dir, c.export.draft = str(tmp_path / "plain"), False
  export.run(config.resolve(c), tiny_run / "whole")
  plain = load_file(tmp_path / "plain" / "model.safetensors")["model.embed_tokens.weight"]
  np.testing.assert_array_equal(written["model.embed_tokens.weight"][:256], plain)


def test_other_tokens_are_refused(tiny_run, teacher, tmp_path):
  """The same number of tokens, of which two have changed places; then one more token."""
  parsed = json.loads((teacher / "tokenizer.json").read_text())
  other = tmp_path / "other"
  shutil.copytree(teacher, other)
  c = draft_config(tiny_run, other, tmp_path / "draft")
  (other / "tokenizer.json").write_text(json.dumps(parsed, indent=3))  # the same
  resolved = config.resolve(c)
  export.run(resolved, tiny_run / "whole")
  shutil.rmtree(tmp_path / "draft")
  vocabulary = parsed["model"]["vocab"]
  swapped = vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}
  for changed, found in (
    (swapped, "2 of its tokens differ: id .* is 'a' for the student and 'b' for the teacher"),
    (vocabulary | {"ab": 256}, "1 of its tokens differ: id 256 is None .* and 'ab' for"),
  ):
    parsed["model"]["vocab"] = changed
    (other / "tokenizer.json").write_text(json.dumps(parsed))
    with pytest.raises(InputError, match=found):
      export.run(resolved, tiny_run / "whole")
    assert not (tmp_path / "draft").exists()


def test_what_cannot_be_a_draft(tiny_run, teacher, tmp_path):
  c = draft_config(tiny_run, teacher, tmp_path / "draft")
  student = draft.open_source(config.resolve(c).student)
  with pytest.raises(InputError, match="export.draft is True; expected False with .*'peft'"):
    c.export.lora = "peft"
    draft.rows(config.resolve(c), student, None)
  c.export.lora = "merged"
  with pytest.raises(InputError, match=r"the student has no tokenizer\. Set data.tokenizer"):
    draft.rows(config.resolve(c), student, None)
  (tmp_path / "bert").mkdir()
  (tmp_path / "bert" / "config.json").write_bytes(hf_json(bert.TINY.to_hf()))
  c.teacher.source = str(tmp_path / "bert")
  with pytest.raises(InputError, match="because the teacher is a bert model and not a decoder"):
    draft.rows(config.resolve(c), student, None)


@pytest.mark.slow
def test_transformers_takes_the_draft(tiny_run, teacher, tmp_path):
  """The texts are those of the teacher alone, and a draft that is the teacher is always right."""
  path = Path(__file__).parents[2] / "tools" / "bench" / "draft.py"
  spec = importlib.util.spec_from_file_location("bench_draft", path)
  bench = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(bench)
  wider = dataclasses.replace(llama.TINY, vocab_size=264)
  model = jax.jit(lambda key: llama.Model(wider, key))(jax.random.key(1))
  hub_export.export_model(
    model, tmp_path / "teacher", tokenizer=None, generation={}, card="", dtype="float32"
  )
  c = draft_config(tiny_run, teacher, tmp_path / "draft")
  export.run(config.resolve(c), tiny_run / "whole")
  c.export.dir, c.export.draft = str(tmp_path / "plain"), False
  export.run(config.resolve(c), tiny_run / "whole")
  names = ("teacher", "teacher", "draft", "plain")
  theirs, again, ours, plain = (bench.load(tmp_path / name) for name in names)
  prompts = [[1, 2, 3, 4], [5, 6, 7]]
  alone, passes, _ = bench.generate(theirs, prompts, 10, "greedy")
  assert passes == 20
  for mode in bench.MODES:
    texts, passes, _ = bench.generate(theirs, prompts, 10, mode, again, 4)
    assert passes == 4  # of 2 texts with 10 tokens: 4 are proposed and 1 is added, twice
    texts, passes, _ = bench.generate(theirs, prompts, 10, mode, ours, 4)
    assert 4 < passes <= 20
    assert mode == "sampled" or texts == alone
  with pytest.raises(ValueError, match="different tokenizers"):
    bench.generate(theirs, prompts, 10, "greedy", plain, 4)
