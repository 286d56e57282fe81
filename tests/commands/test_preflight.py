"""The verb preflight: its numbers, its sentences and its errors."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tiny_images
from preflight_config import model_config

from distill_jax import config
from distill_jax.commands import preflight
from distill_jax.errors import InputError
from distill_jax.nn import sharding
from distill_jax.preflight import (
  chips,
  compiler,
  programs,
  slices,
  table,
  topology,
)

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: .[tpu] has it"
)


@pytest.mark.parametrize(
  "name, message",
  [
    ("v5p", "--topology is 'v5p'; expected v5p with one of the shapes 2x2x1, "),
    ("v5p:3x3x3", "expected v5p with one of the shapes 2x2x1, "),
    ("v9:4x4", "is 'v9:4x4'; .* one of the chips v4, v5e, v5p, v6e, tpu7x"),
    ("", "--topology is ''; expected CHIP:SHAPE"),
  ],
)
def test_unknown_topologies(name, message):
  with pytest.raises(InputError, match=message):
    chips.parse(name)


def test_unknown_verb():
  with pytest.raises(
    InputError, match="--verb is 'export'; expected 'train' or 'record' or 'generate'"
  ):
    preflight.run(config.Config(preflight=config.PreflightOptions("v5e:2x2", verb="export")))


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"libtpu is not installed; .*'distill-jax\[tpu\]'"):
    topology.prepare()


@pytest.mark.parametrize(
  "changes, verb, message",
  [
    ({"train.batch_size": 6}, "train", "train.batch_size is 6; expected a positive multiple of 4"),
    ({"records.batch_size": 6}, "record", "records.batch_size is 6; expected a positive multiple"),
    ({"losses": {}}, "train", "losses is {}; expected one loss or more"),
    ({"data.seq_len": 4_096}, "train", "the student has 128 positions"),
    ({"records.kind": "text"}, "record", "records.kind is 'text'; .* that runs a teacher"),
    ({"records.kind": "text"}, "train", "losses.soft needs a teacher's targets, but the records"),
  ],
)
def test_errors_of_the_run_are_raised_by_preflight(changes, verb, message):
  c = model_config()
  for key, value in changes.items():
    if key == "losses":
      c.losses = type(c)()
    else:
      c.update_from_flattened_dict({key: value})
  with pytest.raises(InputError, match=message):
    programs.lower(config.resolve(c), verb, sharding.make_mesh(fsdp=4))


def test_a_dimension_that_does_not_divide():
  with pytest.raises(
    InputError, match="axis 'kv_heads' of size 2 is not divisible by 4, the size of mesh axis"
  ):
    programs.lower(config.resolve(model_config()), "train", sharding.make_mesh(fsdp=1, tensor=4))


CONFIG = """
from distill_jax import config
def get_config():
  c = config.base()
  c.teacher.shape = c.student.shape = "tiny"
  c.student.dtype = c.teacher.dtype = "bfloat16"
  c.data.seq_len, c.data.sequences = 128, 100
  c.records.n, c.records.batch_size, c.train.batch_size = 15, 8, 8
  c.train.steps, c.train.chunk, c.mesh.tensor = 10, 64, 2
  c.losses.soft = config.loss("kd")
  return c
"""
KEYS = (
  "fits",
  "chips",
  "peak_bytes_per_device",
  "hbm_bytes_per_device",
  "flops_per_step",
  "collective_bytes_per_device",
  "step_seconds_bound",
  "mfu_bound",
  "tokens_per_second_bound",
  "chip_hours",
)


def start(path, *flags):
  command = [sys.executable, "-m", "distill_jax.cli", "preflight", f"--config={path}", *flags]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@needs_libtpu
def test_commands_run_at_the_same_time(tmp_path):
  """Two processes: training on two slices as JSON, and recording on one slice as text."""
  path = tmp_path / "c.py"
  path.write_text(CONFIG)
  both = (
    start(path, "--topology=v5e:2x2", "--num_slices=2", "--config.mesh.data=2", "--json"),
    start(path, "--topology=v5e:2x2", "--verb=record"),
  )
  (out, err), (words, more) = (p.communicate(timeout=200) for p in both)
  assert [p.returncode for p in both] == [0, 0], err + more
  r = json.loads(out.splitlines()[-1])
  assert all(r[key] is not None for key in KEYS) and r["fits"] and r["chips"] == 8
  assert r["mesh"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
  parts, peak = sum(r["bytes_per_device"].values()), r["peak_bytes_per_device"]
  assert 0.9 * peak < parts <= peak  # the layouts of small arguments are padded
  twice = r["flops"]["recomputed"] + r["flops"]["masked"]
  assert r["flops_per_step"] == pytest.approx(sum(r["flops"].values()) - twice)
  assert 0 < r["mfu_bound"] <= 1
  assert r["tokens_per_second_bound"] == pytest.approx(8 * 128 / r["step_seconds_bound"])
  assert r["store_bytes"] == pytest.approx(100 * 128 * r["store_bytes_per_token"], rel=0.01)
  assert r["chip_hours"] == pytest.approx(10 * r["step_seconds_bound"] * 8 / 3600)
  assert words.startswith("Fits: ") and "records take about" in words
  # Each device sends its part of the gradient to the other slice, once, and a few sums.
  gradient = r["bytes_per_device"]["parameters"]
  assert gradient / 4 < r["collectives"]["dcn all-reduce"] < 1.2 * gradient
  assert {"all-gather", "reduce-scatter"} & r["collectives"].keys()


@pytest.mark.parametrize("verb", ["train", "record"])
@pytest.mark.parametrize("tasks", [1, 2])
def test_tasks_are_compiled_without_an_estimate_of_their_operations(
  monkeypatch, tmp_path, verb, tasks
):
  monkeypatch.setattr(topology, "prepare", lambda: None)
  monkeypatch.setattr(topology, "make_mesh", lambda *a: sharding.make_mesh(fsdp=4))
  monkeypatch.setattr(slices, "smallest_slice", lambda *a: None)
  tiny_images.write_idx(tmp_path)
  c = tiny_images.configured(tmp_path)
  if tasks == 2:
    c.tasks.others, c.records.task = c.tasks.things, "others"
    c.train.records = (*c.train.records, *c.train.records)
    for model in (c.teacher, c.student):
      model.changes = dict(model.changes) | {"num_labels": 6}
  asked = config.PreflightOptions("v5e:2x2", verb=verb)
  r = preflight.run(dataclasses.replace(config.resolve(c), preflight=asked))
  assert r["fits"] and r["bytes_per_device"]["teacher" if verb == "record" else "parameters"]
  assert verb == "record" or r["collective_bytes_per_device"]
  assert {r[k] for k in ("flops", "bounds", "tokens", "store_bytes_per_token")} == {None}
  words = table.text(r)
  assert words.startswith("Fits: ") and "operations" not in words and "tokens" not in words


def test_the_smallest_slice_can_have_another_mesh(monkeypatch):
  """The config has 16 devices in fsdp, and the smallest slice has four devices."""
  monkeypatch.setattr(topology, "prepare", lambda: None)
  mesh_of = lambda axes, name, _: axes.make()
  monkeypatch.setattr(topology, "make_mesh", mesh_of)
  memory = compiler.Memory(1, 0, 1, 2)
  monkeypatch.setattr(compiler, "compile_step", lambda *a: (memory, "compiled"))
  c = model_config()
  c.mesh.fsdp = 16
  found = slices.smallest_slice(config.resolve(c), "train", topology.Hardware("v5e:4x4"), fits=True)
  assert found == {
    "topology": "v5e:2x2",
    "mesh": {"data": 1, "fsdp": 4, "context": 1, "tensor": 1},
    "proven": True,
    "peak_bytes_per_device": 2,
  }


@needs_libtpu
def test_libtpu_prints_nothing_without_a_tpu():
  script = "from distill_jax import cli; cli.hush_libtpu(); import jax; jax.devices()"
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_PLATFORMS", "TPU_"))}
  # Otherwise the lock of another process would suppress the output.
  env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
  ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
  assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_text_of_a_verdict():
  r = {
    "fits": False,
    "peak_bytes_per_device": 30 * 2**30,
    "hbm_bytes_per_device": 16 * 2**30,
    "bytes_per_device": {"parameters": 2**30, "optimizer": 2**31},
  }
  assert table.verdict(r) == (
    "Does not fit: 30.00 GiB needed, 16.00 GiB available per device. The largest part is "
    "optimizer, 2.00 GiB."
  )


@needs_libtpu
@pytest.mark.slow
def test_a_student_of_7b_fits_on_64_chips():
  path = "configs/r1_qwen_7b.py"
  process = start(path, "--topology=v5p:4x4x4", "--json")
  out, err = process.communicate(timeout=900)
  r = json.loads(out.splitlines()[-1])
  assert process.returncode == 0 and r["fits"], err
  # 6 operations per weight and token, and those of attention; arXiv:2204.02311, appendix B.
  tokens = 256 * 4_096
  assert r["flops_per_step"] == pytest.approx(6 * 7.07e9 * tokens, rel=0.1)
  # Weights are gathered twice and gradients scattered once. Gradients that are all-reduced would be
  # sent twice, which makes 3.7 times the weights.
  assert r["collective_bytes_per_device"] < 3.1 * 2 * 7_615_616_512
