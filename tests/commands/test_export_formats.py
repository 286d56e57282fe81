"""The command export: what it refuses before it reads anything, and the numbers of training."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from distill_jax import config
from distill_jax.commands import export
from distill_jax.commands.record import run as record
from distill_jax.errors import InputError
from distill_jax.models import gemma3, loading, qwen2
from distill_jax.models.options import StudentOptions
from distill_jax.nn import sharding
from distill_jax.runtime.workdir import Workdir
from distill_jax.training.loop import train


def resolved(folder, **options):
  c = tiny.tiny(folder)
  c.export.dir = str(folder / "out")
  c.export.update(options)
  return config.resolve(c)


def test_wrong_keys_are_refused_before_anything_is_read(tmp_path):
  c = resolved(tmp_path, format="gguf", quant="int4")
  with pytest.raises(InputError, match="export.quant is 'int4'; expected one of F32"):
    export.run(c, tmp_path / "no run")


@pytest.mark.parametrize("changed", [{"changes": {"rope_theta": 1e6}}, {"new": ("head",)}])
def test_a_base_that_peft_would_load_without_the_changes_is_not_named(changed, monkeypatch):
  monkeypatch.setattr(export, "locate", lambda source: "/nowhere")
  monkeypatch.setattr(export, "read_hf_json", lambda path: qwen2.TINY.to_hf())
  spec = StudentOptions(source="hub:Qwen/Qwen2.5-7B@main", train="lora")
  assert export._base(spec, qwen2.TINY) == ("Qwen/Qwen2.5-7B", "main")
  assert export._base(dataclasses.replace(spec, **changed), qwen2.TINY) is None


def test_a_base_that_peft_would_load_with_a_vision_tower_is_not_named(tmp_path):
  """Its modules have other names then, and PEFT would leave the adapters out."""
  spec, text = StudentOptions(source=str(tmp_path), train="lora"), gemma3.TINY.to_hf()
  both = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
  for hf, base in ((text, (str(tmp_path), "")), (both, None)):
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert export._base(spec, gemma3.TINY) == base


@pytest.mark.parametrize(
  "options, message",
  [
    ({"quant": "int4", "group": 24}, "export.group is 24; expected a divisor of 64, the number of"),
    ({"format": "gguf"}, "The tokenizer has no token that ends a text"),
  ],
)
def test_a_student_without_a_place_in_the_format_is_refused_before_anything_is_measured(
  options, message, tiny_run, tmp_path, monkeypatch
):
  monkeypatch.setattr(export.loss, "of_width", None)
  c = resolved(tmp_path, **options)
  with pytest.raises(InputError, match=message):
    export.run(c, tiny_run / "whole")
  assert not (tmp_path / "out").exists()


def for_llama_cpp(path):
  """Changes a tokenizer of bytes: llama.cpp needs a merge, and a token that ends texts."""
  made = json.loads(path.read_text())
  vocab = made["model"]["vocab"]
  vocab["ab"] = vocab.pop(max(vocab, key=vocab.get))
  made["model"]["merges"] = [["a", "b"]]
  path.write_text(json.dumps(made))
  path.with_name("tokenizer_config.json").write_text('{"eos_token": "!"}')


@pytest.mark.slow
def test_a_gguf_file_has_the_numbers_of_training(tmp_path):
  c = tiny.tiny(tmp_path)
  for_llama_cpp(tmp_path / "tokenizer.json")
  c.teacher.source = ""
  c.student.train, c.student.quantise.grid = "quantised", "Q4_0"
  c.train.steps = c.train.checkpoint_every = 4
  c.export.dir, c.export.format, c.export.embedding = str(tmp_path / "out"), "gguf", "F32"
  c = config.resolve(c)
  record(c, tmp_path / "records")
  with Workdir(tmp_path / "run", c) as workdir:
    train(c, workdir)
    made = export.run(c, workdir)
  file = tmp_path / "out/model-Q4_0.gguf"
  assert made["bytes"] == file.stat().st_size and "kl_to_float" not in made
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  of_run, of_file = (
    loading.open_source(config.StudentOptions(source=source)).load(mesh, jax.random.key(0)).model
    for source in (f"run:{tmp_path / 'run'}", str(file))
  )
  jax.tree.map(np.testing.assert_array_equal, of_run, of_file)
