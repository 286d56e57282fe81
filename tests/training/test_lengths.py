"""Training on stores of several sequence lengths: equal losses, exact resume, any processes."""

import json

import jax
import mesh_worker
import numpy as np
import pytest
import steps
import tiny
from tiny_run import train

from distill_jax import config
from distill_jax.commands import pack
from distill_jax.data.packing import BestFitPacker, TokenBlock
from distill_jax.errors import InputError
from distill_jax.losses import ce
from distill_jax.models import llama
from distill_jax.records import collate
from distill_jax.schedules import constant
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.step import Fixed

LENGTHS = (16, 32)


def test_documents_have_the_same_loss_and_gradient_in_rows_of_any_length():
  """Eight documents in one row of 64, and in eight rows of 8."""
  ids = np.random.default_rng(0).integers(0, steps.V, 64).astype(np.int32)
  results = []
  for length in (64, 8):
    packer = BestFitPacker((length,))
    rows = [*packer.add(TokenBlock(ids, np.full(8, 8))), *packer.finish()]
    assert len(rows) == 64 // length
    batch = jax.tree.map(jax.numpy.asarray, collate.collate([row.record() for row in rows]))
    step = steps.make_step(losses={"hard": ce.Loss(weight=constant(1.0))})
    results.append(steps.run(step, batches=[batch]))
  (state, (metrics,)), (other_state, (other,)) = results
  assert metrics["tokens"] == other["tokens"] == 56
  # Sums in float32 in another order.
  assert metrics["loss"] == pytest.approx(other["loss"], rel=1e-6)
  assert metrics["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
  # Adam divides by the gradient's size, so that rounding counts most where it is small.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), state.params, other_state.params
  )


def test_short_sequences_have_no_more_logits_in_memory():
  """A row of 64 with chunks of 16, and eight rows of 8, need arrays of 16 * V logits at most."""
  for length, rows in ((64, 1), (8, 8)):
    step = steps.make_step(losses={"hard": ce.Loss(weight=constant(1.0))}, chunk=16, longest=64)
    ones = np.ones(length, np.int32)
    record = {"tokens_T": ones, "segments_T": ones, "mask_T": ones.astype(bool)}
    batch = jax.tree.map(jax.numpy.asarray, collate.collate([record] * rows))
    model = jax.eval_shape(lambda key: llama.Model(llama.TINY, key), jax.random.key(0))
    arguments = (model, {}), batch, Fixed({}, 0, 1.0), {"hard": 1.0}
    program = str(jax.make_jaxpr(step.loss)(*arguments))
    assert f"f32[{rows},{16 // rows},{steps.V}]" in program
    assert f"f32[{rows},{length},{steps.V}]" not in program


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """The folder of text stores of two lengths."""
  folder = tmp_path_factory.mktemp("lengths")
  c = configured(folder, folder)
  sizes = (3, 3, 3, 10, 10, 27)
  texts = [{"text": f"{i} {'qzxkvw' * 5:.{sizes[i % 6]}}"} for i in range(90)]
  (folder / "corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
  done = pack.run(config.resolve(c), folder / "packed")
  assert min(done[f"{n}/sequences"] for n in LENGTHS) > 5
  return folder


def configured(folder, text):
  """The config of a run on the stores of `text`."""
  c = tiny.tiny(folder)
  c.teacher.source, c.losses = "", {"hard": config.loss("ce")}
  c.data.kind, c.data.path, c.data.sequences = "jsonl", str(text / "corpus.jsonl"), 0
  c.data.buckets = LENGTHS
  c.train.records = tuple(str(text / "packed" / str(n)) for n in LENGTHS)
  c.train.batch_size, c.train.checkpoint_every, c.train.steps = 4, 3, 8
  return c


@pytest.mark.slow
def test_a_run_continues_bit_for_bit(text, tmp_path, monkeypatch):
  c, shapes, real = configured(tmp_path, text), [], collate.to_device

  def seen(batch, rows):
    shapes.append(batch.labels_BT.shape)
    if len(shapes) == 8 + 5:
      raise KeyboardInterrupt
    return real(batch, rows)

  monkeypatch.setattr(collate, "to_device", seen)
  train(c, tmp_path / "whole")
  assert set(shapes) == {(8, 16), (4, 32)} and len(shapes) == 8
  with pytest.raises(KeyboardInterrupt):
    train(c, tmp_path / "stopped")
  assert sorted(p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()) == ["3"]
  train(c, tmp_path / "stopped")
  assert shapes[8 + 5 :] == shapes[3:8]
  assert tiny.measured(tmp_path / "whole") == tiny.measured(tmp_path / "stopped")


def test_lengths_that_do_not_divide_are_refused_before_anything_compiles(text, tmp_path):
  c = configured(tmp_path, text)
  c.data.seq_len, c.data.buckets = 24, ()
  pack.run(config.resolve(c), tmp_path / "packed24")
  c.train.records = (*c.train.records, str(tmp_path / "packed24"))
  with pytest.raises(InputError, match=r"sequences of \[16, 24, 32\] .* 24 does not divide 32"):
    train(c, tmp_path / "run")
  c.train.records, c.optim.accumulate = c.train.records[:2], 4
  with pytest.raises(InputError, match="train.batch_size is 4; expected a positive multiple of"):
    train(c, tmp_path / "run2")


@pytest.mark.slow
def test_two_processes_train_as_one(text, tmp_path):
  jobs = {}
  for processes in (1, 2):
    c = configured(tmp_path, text)
    c.mesh.data, c.mesh.fsdp = 2, 1
    jobs[processes] = tmp_path / f"of{processes}"
    job = [("train", jobs[processes], config.resolve(c))]
    mesh_worker.run(job, tmp_path / f"jobs{processes}", processes, 2 // processes)
  one, two = (read_metrics(path) for path in jobs.values())
  for a, b in zip(one, two, strict=True):
    assert a["tokens"] == b["tokens"]
    assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)  # another fusion of operations
