"""A student with another tokenizer from its start to its export."""

import dataclasses
import json

import numpy as np
import pytest
import retarget_runs
import tiny
import tiny_checkpoints
import tiny_run

from distill_jax import config
from distill_jax.commands import evaluate, export, retokenize
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.hub.pretrained import open_model


@pytest.mark.slow
def test_a_student_is_made_trained_exported_and_compared(tmp_path):
  """No key names the student's tokenizer but `retokenize`: the folder of the model has it."""
  source = retarget_runs.write_source(tmp_path / "source")
  shape = dataclasses.replace(
    tiny_checkpoints.CONFIG,
    vocab_size=384,
    max_position_embeddings=128,
    tie_word_embeddings=True,
  )
  weights = {n: 0.2 * x + ("norm" in n) for n, x in tiny_checkpoints.tensors(shape).items()}
  tiny_checkpoints.write_folder(tmp_path / "teacher", shape, weights)
  (source / "teacher.json").replace(tmp_path / "teacher" / "tokenizer.json")
  c = tiny.tiny(tmp_path)
  c.teacher.source = c.student.source = str(tmp_path / "teacher")
  c.teacher.shape = c.student.shape = c.data.tokenizer = ""
  c.retokenize.tokenizer, c.retokenize.dtype = str(source / "student.json"), "float32"
  c.student.keep_layers = (0, 2)
  start = retokenize.run(config.resolve(c), tmp_path)["dir"]
  c.student.source, c.student.keep_layers = start, ()
  c.retarget.update(records=str(source / "records"), workers=1)
  retarget_runs.run(c, tmp_path / "records")
  c.data.seq_len, c.train.steps, c.train.batch_size = 128, 2, 4
  c.train.chunk = 32
  student = tmp_path / "student"
  assert np.isfinite(tiny_run.train(c, student)["loss"])
  c.export.dir = str(tmp_path / "export")
  export.run(config.resolve(c), student)
  made = open_model(c.export.dir)
  ours = load_tokenizer(source / "student.json")
  assert load_tokenizer(c.export.dir).digest == ours.digest
  hf = json.loads((tmp_path / "export" / "config.json").read_text())
  assert hf["vocab_size"] == made.config.vocab_size == 384
  assert (hf["eos_token_id"], hf["bos_token_id"]) == (ours.eos_id, None)
  transformers = pytest.importorskip("transformers")
  read = transformers.AutoConfig.from_pretrained(c.export.dir)
  assert (read.eos_token_id, read.bos_token_id) == (ours.eos_id, None)
  assert len(transformers.AutoTokenizer.from_pretrained(c.export.dir)) == ours.vocab_size
  c.evaluate.update(heldout=False, texts=2, batch_size=4)
  c.evaluate.models = {"run": f"run:{student}", "exported": c.export.dir}
  rows = evaluate.run(config.resolve(c), tmp_path / "evaluation")["texts"]["models"]
  assert rows.keys() == {"teacher", "start", "run", "exported"}
  assert all(0 < row["bits_per_byte"] < 99 for row in rows.values())
  # Apart from the rounding to bfloat16.
  run, exported = (rows[name]["bits_per_byte"] for name in ("run", "exported"))
  assert run == pytest.approx(exported, rel=0.02) and run != rows["start"]["bits_per_byte"]
