"""Every mesh axis across two processes gives the stores and numbers of one process.

Two processes of one device run the verbs on a mesh of two devices, so that the axis of size 2
crosses processes. One process of two devices runs the same. A sum of two numbers does not depend on
their order, so stores have the same bytes, and numbers are equal up to another fusion of operations
in the program of two processes.
"""

import dataclasses
import json

import mesh_worker
import numpy as np
import pytest
import tiny
import tiny_checkpoints
import tiny_image_text
import tiny_seq2seq_tasks
from json_lines import read_lines, write_lines
from safetensors.numpy import load_file

from distill_jax import config
from distill_jax.records.store import open_store
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.run_log import CLOCK

AXES = {"data": (2, 1, 1, 1), "fsdp": (1, 2, 1, 1), "tensor": (1, 1, 2, 1)}
CONTEXT = {"context": (1, 1, 1, 2)}
POD = {"pod": (1, 2, 2, 1)}  # see mesh_worker.py
SHAPE = dataclasses.replace(tiny_checkpoints.CONFIG, vocab_size=256, tie_word_embeddings=True)


def across(c, axis):
  """Returns the config on a mesh of two devices, on one axis."""
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.context = (AXES | CONTEXT | POD)[axis]
  return c


def text_config(folder, axis):
  c = across(tiny.tiny(folder), axis)
  c.teacher.source = ""
  c.data.sequences = 14  # the last batch of a shard is padded
  c.train.steps = c.train.checkpoint_every = 3
  c.evaluate.batch_size, c.evaluate.sequences = 4, 5
  return c


def core_config(folder, where, axis):
  """Returns the config of `core`, with held-out text."""
  c = text_config(folder, axis)
  c.train.records, c.train.heldout = (str(where / "sampled"),), (str(where / "sampled/heldout"),)
  lines = ({"text": sentence} for sentence in tiny.sentences())
  c.data.kind, c.data.path = "jsonl", str(write_lines(folder / "corpus.jsonl", lines))
  c.data.heldout_fraction, c.records.heldout_sequences = 0.3, 7
  c.train.best_metric, c.train.eval_every = "heldout/loss", 2
  return c


def core(folder, where, axis):
  """record (sampled), and train with evaluations."""
  c = config.resolve(core_config(folder, where, axis))
  return [("record", where / "sampled", c), ("train", where / "student", c)]


def core_evaluated(folder, where, axis):
  """core, and evaluate with held-out text and choices by likelihood."""
  c = core_config(folder, where, axis)
  c.evaluate.models = {"student": f"run:{where / 'student'}"}
  endings = ["1.", "is 4.", "b!", "c"]
  rows = [{"activity_label": "Sum", "ctx": "as", "endings": endings, "label": i} for i in range(3)]
  questions = write_lines(folder / "hellaswag.jsonl", rows)
  c.evals.hellaswag = config.benchmark("hellaswag", path=str(questions))
  evaluate = ("evaluate", where / "evaluated", config.resolve(c))
  return [*core(folder, where, axis), evaluate]


def more(folder, where, axis):
  """record (top-k with features), pseudo-labels, shrink, and embeddings of image-text pairs."""
  c = text_config(folder, axis)
  c.records.kind, c.records.n, c.records.taps, c.records.tap_kind = "topk", 8, (1,), "qkv"
  jobs = [("record", where / "topk", config.resolve(c))]
  c = across(tiny_seq2seq_tasks.two_steps(folder, "t5", num_decoder_layers=1, num_layers=1), axis)
  pairs = write_lines(
    folder / "translations.jsonl", ({"en": f"no {i}", "de": f"{i}"} for i in range(6))
  )
  c.tasks.main = config.task(
    "translation",
    path=str(pairs),
    source="en",
    target="de",
    source_len=8,
    target_len=10,
    beams=2,
    batch_size=4,
    heldout_fraction=0.0,
    tokenizer=tiny_seq2seq_tasks.write_tokenizer(folder / "t5.json"),
  )
  c.data.tokenizer = c.tasks.main.tokenizer
  jobs.append(("generate", where / "texts", config.resolve(c)))
  c = text_config(folder, axis)
  if not (folder / "teacher").exists():
    weights = {n: 0.2 * x + ("norm" in n) for n, x in tiny_checkpoints.tensors(SHAPE).items()}
    tiny_checkpoints.write_folder(folder / "teacher", SHAPE, weights)
  c.teacher.source, c.teacher.shape = str(folder / "teacher"), ""
  c.shrink.dtype, c.shrink.sequences = "float32", 4
  c.shrink.layers, c.shrink.heads, c.shrink.intermediate, c.shrink.hidden = 2, 2, 32, 8
  c.shrink.dir = str(where / "shrunk-model")
  jobs.append(("shrink", where / "shrunk", config.resolve(c)))
  c = across(tiny_image_text.configured(folder), axis)
  c.train.online = True
  c.losses.soft = config.loss("kd")
  c.evaluate.models = {"student": f"run:{where / 'towers'}"}
  c = config.resolve(c)
  return [*jobs, ("train", where / "towers", c), ("evaluate", where / "towers-evaluated", c)]


def samples(folder, where, axis):
  """generate, with weights gathered once and for every token, and rows to round up."""
  prompts = write_lines(folder / "prompts.jsonl", [{"prompt": p} for p in ("3 times", "a", "is 4")])
  jobs = []
  for gather in ("once", "per_token"):
    c = text_config(folder, axis)
    c.generate.update(prompts=str(prompts), samples=2, max_new_tokens=8, cache_len=32, steps=4)
    c.generate.update(batch_size=3, prefill_rows=1, prefill_chunk=16, gather=gather)
    jobs.append(("generate", where / gather, config.resolve(c)))
  return jobs


def run_twice(folder, jobs, axes):
  """Runs the jobs of each axis in one process and in two; returns the folders by axis."""
  folders = {}
  for processes in (1, 2):
    todo = []
    for axis in axes:
      where = folder / axis / f"{processes}"
      todo += jobs(folder, where, axis)
      folders.setdefault(axis, []).append(where)
    devices = 4 if axes == ["pod"] else 2
    file = folder / f"jobs{processes}.json"
    mesh_worker.run(todo, file, processes, devices // processes, axes[0])
  return folders


def compare_stores(one, two):
  digests = [[s.sha256 for s in open_store(f).manifest.shards] for f in (one, two)]
  assert digests[0] == digests[1] and len(digests[0]) == 3


def compare_numbers(one, two, path=""):
  """Compares JSON values; clocks are left out."""
  if isinstance(one, dict):
    assert one.keys() == two.keys(), path
    for key in one.keys() - CLOCK - {"tokens_per_second", "seconds", "dir"}:
      compare_numbers(one[key], two[key], f"{path}.{key}")
  elif isinstance(one, list):
    assert len(one) == len(two), path
    for i, pair in enumerate(zip(one, two, strict=True)):
      compare_numbers(*pair, f"{path}[{i}]")
  elif isinstance(one, float):
    assert one == pytest.approx(two, rel=2e-5, abs=2e-6), path
  elif not isinstance(one, str) or "/" not in one:
    assert one == two, path


def compare_core(one, two):
  compare_stores(one / "sampled", two / "sampled")
  metrics = read_metrics(one / "student")
  assert len(metrics) == 3 and all(row["tokens"] for row in metrics)
  assert [i for i, row in enumerate(metrics) if "heldout/kl/teacher" in row] == [1, 2]
  compare_numbers(metrics, read_metrics(two / "student"))


def compare_core_evaluated(one, two):
  compare_core(one, two)
  evaluations = [json.loads((f / "evaluated/evaluation.json").read_text()) for f in (one, two)]
  assert evaluations[0]["evals"]["hellaswag"]["student"] and evaluations[0]["models"]["student"]
  compare_numbers(*evaluations)


def compare_more(one, two):
  compare_stores(one / "topk", two / "topk")
  for folder in ("shrunk/shrink.json", "towers-evaluated/evaluation.json"):
    compare_numbers(*(json.loads((f / folder).read_text()) for f in (one, two)))
  assert open_store(two / "topk")[0]["taps_PTD"].shape[0] == 1
  pairs = [read_lines(f / "texts/pairs.jsonl") for f in (one, two)]
  assert pairs[0] == pairs[1] and pairs[0]
  compare_numbers(*(read_metrics(f / "towers") for f in (one, two)))
  a, b = (load_file(f / "shrunk-model/model.safetensors") for f in (one, two))
  assert a.keys() == b.keys()
  for name, x in a.items():
    np.testing.assert_allclose(x, b[name], rtol=1e-6, atol=1e-7)


def test_the_tensor_axis_crosses_processes(tmp_path):
  """Before sharding.rows, `train` ended with half of the tokens, and no error."""
  for one, two in run_twice(tmp_path, core, ["tensor"]).values():
    compare_core(one, two)


@pytest.mark.slow
def test_the_context_axis_crosses_processes(tmp_path):
  for one, two in run_twice(tmp_path, core_evaluated, ["context"]).values():
    compare_core_evaluated(one, two)


@pytest.mark.slow
def test_processes_have_parts_of_several_groups(tmp_path):
  """Two processes of two devices hold parts of both groups, and each writes the rows of one."""
  for one, two in run_twice(tmp_path, core_evaluated, ["pod"]).values():
    compare_core_evaluated(one, two)


@pytest.mark.slow
def test_every_axis_crosses_processes(tmp_path):
  folders = run_twice(tmp_path, core_evaluated, [*AXES])
  for one, two in folders.values():
    compare_core_evaluated(one, two)
  resume_record(tmp_path, folders["data"][0])


def resume_record(folder, one):
  """Two processes, the first of which writes all rows, record the shards that one has lost."""
  for name in ("sampled/records-00001.array_record", "sampled/records-00002.array_record"):
    (one / name).rename(folder / name[-20:])
  c = core(folder, one, "tensor")[0][2]
  mesh_worker.run([("record", one / "sampled", c)], folder / "resumed.json", 2, 1)
  for number in (1, 2):
    name = f"records-0000{number}.array_record"
    assert (one / "sampled" / name).read_bytes() == (folder / name[-20:]).read_bytes()


@pytest.mark.slow
def test_every_axis_crosses_processes_in_other_verbs(tmp_path):
  for one, two in run_twice(tmp_path, more, [*AXES]).values():
    compare_more(one, two)


@pytest.mark.slow
def test_weights_are_gathered_once_over_processes(tmp_path):
  for one, two in run_twice(tmp_path, samples, ["fsdp", "tensor"]).values():
    same = [
      f / gather / "samples/00000.jsonl" for f in (one, two) for gather in ("once", "per_token")
    ]
    rows = [read_lines(path) for path in same]
    assert len(rows[0]) == 6
    for other in rows[1:]:
      compare_numbers(rows[0], other)
