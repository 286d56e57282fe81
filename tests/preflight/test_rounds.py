"""`preflight --verb=on_policy`: bytes, bounds and cost by hand."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
import tiny_pair
from preflight_config import CONFIGS, model_config

from distill_jax import config
from distill_jax.commands import preflight
from distill_jax.errors import InputError
from distill_jax.generation import placement
from distill_jax.models import llama, loading
from distill_jax.nn import params, sharding
from distill_jax.preflight import (
  chips,
  estimate,
  flops,
  round_teachers,
  rounds,
  step_estimate,
  topology,
)
from distill_jax.records import collate, student_rows

CHIP = chips.CHIPS["v5e"]
CHIPS = 4
STEP_S = 0.25  # seconds of the step, as if it had been compiled
TEMPORARIES = 2**20


def stub_of_compiling(c, verb, program, hardware, mesh, operations=None):
  """The estimate of a step that takes STEP_S seconds."""
  operations = operations or flops.step_flops(c, verb, program.rows)
  sizes = program.arguments | {"outputs": 0, "temporaries": TEMPORARIES}
  return dict.fromkeys(rounds.OF_STEP) | {
    "fits": True,
    "bytes_per_device": sizes,
    "peak_bytes_per_device": sum(sizes.values()),
    "flops": operations,
    "step_seconds_bound": STEP_S,
    "mfu_bound": 0.5,
  }


def estimated(monkeypatch, **changes):
  """Returns the estimate for a tiny pair on four virtual devices, and its config."""
  monkeypatch.setattr(topology, "prepare", lambda: None)
  monkeypatch.setattr(step_estimate, "estimate", stub_of_compiling)
  devices = jax.devices()[:CHIPS]
  make = lambda axes, *a: axes.make(devices)
  monkeypatch.setattr(topology, "make_mesh", make)
  c = model_config()
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 2, 2
  c.teacher.dtype = c.student.dtype = "bfloat16"
  c.generate.update(cache_len=64, batch_size=4, samples=2, max_new_tokens=48)
  c.on_policy.every, c.train.batch_size, c.train.steps = 3, 4, 30
  c.train.online = True
  c.update_from_flattened_dict(changes)
  asked = config.PreflightOptions("v5e:2x2", verb="on_policy", dollars_per_chip_hour=2.0)
  c = dataclasses.replace(config.resolve(c), preflight=asked)
  return preflight.run(c), c


@pytest.fixture(scope="module")
def live():
  """The estimate with the teacher in the step, and its config."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    return estimated(monkeypatch)


def test_live_rounds_by_hand(live):
  r, c = live
  student = loading.open_source(c.student)
  sizes = r["bytes_per_device"]
  assert set(sizes) == {"generate", "train"} and r["fits"]
  assert r["rows_per_round"] == 12 and r["tokens_per_round"] == 12 * 48
  numbers = params.count(student.abstract)
  assert sizes["generate"]["decode copy"] == pytest.approx(2 * numbers / 2, rel=0.05)
  row = 2 * student.decoder_config.cache_width * student.decoder_config.num_hidden_layers * 64
  assert sizes["generate"]["cache"] == 2 * row / 2  # 4 rows over fsdp=2, and half of the heads
  for name in ("parameters", "optimizer", "teacher"):
    assert sizes["generate"][name] == sizes["train"][name] > 0
  assert r["peak_bytes_per_device"]["train"] == sum(sizes["train"].values())

  step, generate = r["decode"]["step_seconds_bound"], r["seconds_per_round"]["generate"]
  mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:CHIPS])
  need = placement.memory(student.abstract, student.compute, mesh, c.generate)
  copy = (need.gathered - need.stored) / CHIP.ici
  prompts = flops.forward_flops(student, 6, 16)
  prefill = (prompts.weights + prompts.attention) / (CHIPS * CHIP.flops)
  assert generate == pytest.approx(3 * 48 * step + prefill + copy)
  assert min(prefill, copy) > 1e-5 * generate
  assert r["generate_seconds_assumed"] == 4 * generate

  share = r["flops"]["teacher"] / sum(r["flops"].values())
  assert r["seconds_per_round"]["score"] == pytest.approx(3 * STEP_S * share)
  assert r["seconds_per_round"]["train"] == pytest.approx(3 * STEP_S * (1 - share))
  whole = generate + 3 * STEP_S
  assert r["round_seconds_bound"] == pytest.approx(whole)
  assert r["tokens_per_second_bound"] == pytest.approx(12 * 48 / whole)
  assert r["chip_hours"] == pytest.approx(10 * whole * CHIPS / 3600)
  text = preflight.text(r)
  assert (
    text.startswith("Fits: at most ") and "$" in text and "seconds per round of 3 steps" in text
  )


def test_operations_are_those_of_the_rows_that_are_sampled(live):
  """The rows of a round have generate.cache_len positions; data.seq_len is 32."""
  r, c = live
  forward = flops.forward_flops(loading.open_source(c.student), 4, 64)
  assert r["flops"]["layers"] == 3 * forward.weights


def test_the_teacher_of_stored_scores_has_its_own_part(monkeypatch):
  stored = {"train.online": False, "records.batch_size": 8}
  r, c = estimated(monkeypatch, **stored)
  sizes = r["bytes_per_device"]
  teacher = loading.open_source(c.teacher)
  weights = params.count(teacher.abstract) * 4 / 4
  for part in ("generate", "score", "train"):
    assert sizes[part]["teacher"] == pytest.approx(weights, rel=0.05)
  assert r["peak_bytes_per_device"]["train"] == sum(sizes["train"].values())
  # Two passes over 8 rows. A device sends its half of the gathered weights, and, for each layer,
  # its part of two sums over tensor=2 of the activations of 4 rows, in bfloat16.
  shape = teacher.decoder_config
  sums = 2 * shape.num_hidden_layers * 4 * 64 * shape.hidden_size * 2
  sent = 2 * params.count(teacher.abstract) / 2 / 2 + sums
  assert r["seconds_per_round"]["score"] == pytest.approx(2 * sent / CHIP.ici, rel=1e-3)
  assert r["seconds_per_round"]["train"] == 3 * STEP_S
  whole = sum(r["seconds_per_round"].values())
  assert r["chip_hours"] == pytest.approx(10 * whole * CHIPS / 3600, rel=1e-9)
  assert "score" in preflight.text(r)


def test_one_of_several_teachers_of_stored_scores_is_in_memory(monkeypatch):
  one, _ = estimated(monkeypatch, **{"train.online": False})
  two, _ = estimated(monkeypatch, **{"train.online": False, "teachers": {"maths": ""}})
  assert two["bytes_per_device"] == one["bytes_per_device"]
  assert "(assumed, since there are no prompts yet): teacher 50%, maths 50%." in preflight.text(two)


def test_all_online_teachers_are_in_memory_and_one_is_in_a_step(live, monkeypatch):
  one, _ = live
  two, _ = estimated(monkeypatch, teachers={"maths": ""})
  assert two["flops"] == one["flops"]
  teacher = one["bytes_per_device"]["train"]["teacher"]
  for part in ("generate", "train"):
    assert two["bytes_per_device"][part]["teachers"] == teacher
    assert two["peak_bytes_per_device"][part] == one["peak_bytes_per_device"][part] + teacher


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
  """Returns the sources of a narrow and a wide teacher, by name."""
  sources = {}
  for name, width in (("narrow", 128), ("wide", 4096)):
    folder = tmp_path_factory.mktemp(name)
    shape = dataclasses.replace(llama.CONFIGS["tiny"], intermediate_size=width)
    (folder / "config.json").write_text(json.dumps(shape.to_hf()))
    sources[name] = str(folder)
  return sources


@pytest.mark.parametrize("online", [True, False])
def test_teachers_of_other_sizes_have_their_own_bytes(sizes, monkeypatch, online):
  """With stored scores, the bytes are those of the largest teacher."""
  narrow, wide = sizes.values()

  def generating(source, **teachers):
    changes = {"train.online": online, "teacher.source": source, "teacher.shape": ""}
    r, _ = estimated(monkeypatch, **changes, teachers=teachers)
    return r["bytes_per_device"]["generate"]

  small, large = generating(narrow), generating(wide)
  assert large["teacher"] > 2 * small["teacher"]
  if online:
    assert generating(narrow, other=wide) == small | {"teachers": large["teacher"]}
    assert generating(wide, other=narrow) == large | {"teachers": small["teacher"]}
  else:
    assert generating(narrow, other=wide) == generating(wide, other=narrow) == large


def teachers_of(c, **changes):
  """Returns the teachers on the devices, and those outside the step, of rounds of 12 texts."""
  c.generate.update(cache_len=64, samples=2)
  c.update_from_flattened_dict({"teacher.shape": "", "train.batch_size": 4} | changes)
  c = config.resolve(c)
  mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:CHIPS])
  found = round_teachers.find(c, loading.open_source(c.student))
  hardware = topology.Hardware("v5e:2x2", 1)
  return found, round_teachers.outside_step(c, found, 12, hardware, mesh)


@pytest.fixture
def prompts(tmp_path):
  """Returns a file of prompts of which two thirds name the teacher `other`."""
  file = tmp_path / "prompts.jsonl"
  lines = [{"prompt": "2 + 2 =", "route": route} for route in ("", "other", "other")]
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(file)


@pytest.mark.parametrize("online", [True, False])
def test_each_teacher_scores_its_part_of_the_texts(sizes, prompts, online):
  def score(source, prompts="", **teachers):
    changes = {"train.online": online, "generate.prompts": prompts, "teachers": teachers}
    found, others = teachers_of(model_config(), **changes, **{"teacher.source": source})
    assert sum(teacher.share for teacher in found.values()) == 1
    return round_teachers.step_flops(found, 4)["teacher"] if online else others.seconds

  narrow, wide = score(sizes["narrow"]), score(sizes["wide"])
  assert wide > 2 * narrow
  # Stored: 4 rows are one of the 3 passes over 12 rows, 8 rows are two, and 6 rows too.
  third = score(sizes["narrow"], prompts, other=sizes["wide"])
  assert third == pytest.approx((narrow + 2 * wide) / 3)
  equal = (narrow + wide) / 2 if online else 2 * (narrow + wide) / 3
  assert score(sizes["narrow"], other=sizes["wide"]) == pytest.approx(equal)


def test_a_teacher_without_prompts_is_not_loaded(sizes, prompts):
  given = {"generate.prompts": prompts, "teacher.source": sizes["narrow"]}
  given["teachers"] = {"other": sizes["narrow"], "unused": sizes["wide"]}
  mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:CHIPS])
  for online in (True, False):
    found, others = teachers_of(model_config(), **given, **{"train.online": online})
    assert [*found] == ["teacher", "other"]
    assert others.weights == estimate.model_bytes(found["other"].source, mesh)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
  """Returns config keys of a teacher with other tokens than the student."""
  folder = tmp_path_factory.mktemp("other")
  shape = dataclasses.replace(llama.CONFIGS["tiny"], vocab_size=16)
  (folder / "config.json").write_text(json.dumps(shape.to_hf()))
  (folder / "tokenizer.json").write_bytes(tiny_pair.raw(tiny_pair.TEACHER))
  (folder / "student.json").write_bytes(tiny_pair.raw(tiny_pair.STUDENT))
  named = {"teacher.source": str(folder), "teacher.shape": ""}
  return named | {"data.tokenizer": str(folder / "student.json"), "retarget.seq_len": 96}


def bytes_of_other(teacher):
  """The bytes per device of a teacher's weights and tables."""
  mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:CHIPS])
  tables = sum(x.nbytes for x in jax.tree.leaves(teacher.other.dense_tables))
  return estimate.model_bytes(teacher.source, mesh) + tables


def test_a_live_teacher_with_other_tokens_reads_its_own_rows(other, monkeypatch):
  """The batch is that of the loader."""
  r, c = estimated(monkeypatch, **other, **{"on_policy.reward": "math"})
  student = loading.open_source(c.student)
  (teacher,) = round_teachers.find(c, student).values()
  forward = flops.forward_flops(teacher.source, 4, 96)
  projected = flops.PROJECTED_HEAD * flops.forward_flops(teacher.source, 4, 64).head
  assert r["flops"]["teacher"] == pytest.approx(forward.total - forward.head + projected)
  assert r["flops"]["layers"] == 3 * flops.forward_flops(student, 4, 64).weights
  sizes = r["bytes_per_device"]["train"]
  assert sizes["teacher"] == bytes_of_other(teacher)
  texts = SimpleNamespace(
    read_many=lambda indices: [tiny_pair.sampled_text(i, 64) for i in indices]
  )
  rows = teacher.other._rows(texts, SimpleNamespace(seq_len=64))
  batch = collate.collate(rows.read_many(range(4)), with_targets=False, read=student_rows.read)
  assert sizes["batch"] == sum(x.nbytes for x in jax.tree.leaves(batch)) // 2  # fsdp=2


def test_a_stored_teacher_with_other_tokens_reads_its_own_rows(other):
  found, others = teachers_of(model_config(), **other, **{"records.batch_size": 8})
  (teacher,) = found.values()
  assert others.weights == bytes_of_other(teacher)
  # As in test_the_teacher_of_stored_scores_has_its_own_part, with rows of 96 tokens in float32.
  shape, numbers = teacher.source.decoder_config, params.count(teacher.source.abstract)
  sums = 2 * shape.num_hidden_layers * 4 * 96 * shape.hidden_size * 2
  assert others.seconds == pytest.approx(2 * (4 * numbers / 2 / 2 + sums) / CHIP.ici, rel=1e-3)


def test_servers_score_at_their_own_speed(monkeypatch):
  served = {"train.online": False, "generate.server.urls": ("http://localhost:8000/v1",)}
  r, _ = estimated(monkeypatch, **served)
  assert set(r["bytes_per_device"]) == {"generate", "train"}
  assert r["seconds_per_round"]["score"] == 0
  rate = f"{12 * 64 / r['round_seconds_bound']:,.0f} tokens per second"
  assert "is not included, and the rounds wait for them. With on_policy.lag=1" in preflight.text(r)
  r, _ = estimated(monkeypatch, **served, **{"on_policy.lag": 1})
  assert f"Servers that score {rate} keep up" in preflight.text(r)


def test_steps_on_records_generate_nothing(live, monkeypatch):
  whole, _ = live
  r, _ = estimated(
    monkeypatch, **{"on_policy.records_fraction": 1 / 3, "train.records": ("records",)}
  )
  assert r["rows_per_round"] == 8  # of two steps
  per_row = whole["seconds_per_round"]["generate"] / 12
  assert r["seconds_per_round"]["generate"] == pytest.approx(8 * per_row, rel=0.01)
  seconds = 20 * 4 * per_row + 30 * STEP_S
  assert r["chip_hours"] == pytest.approx(seconds * CHIPS / 3600, rel=0.01)


def test_what_does_not_fit_is_told(monkeypatch):
  monkeypatch.setattr(placement, "ROOM", 1e-6)
  r, _ = estimated(monkeypatch)
  text = preflight.text(r)
  assert not r["fits"] and text.startswith("Does not fit: at most ")
  assert text.splitlines()[0].endswith("at most 0 rows fit.")


def test_what_rounds_refuse_is_refused(monkeypatch):
  for changes, message in (
    ({"generate.samples": 3}, "train.batch_size is 4; expected a multiple of generate.samples"),
    ({"mesh.context": 2, "mesh.fsdp": 1}, "mesh.context is 2; expected 1"),
    ({"on_policy.lag": 2}, "on_policy.lag is 2; expected 0 or 1"),
    ({"on_policy.records_fraction": 0.5}, "on_policy.records_fraction is 0.5; expected 0 without"),
  ):
    with pytest.raises(InputError, match=message):
      estimated(monkeypatch, **changes)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("scores", ["live", "stored"])
def test_qwen3_8b_fits_on_64_chips(scores):
  """The numbers are those in the docstring of the config."""
  command = [sys.executable, "-m", "distill_jax.cli", "preflight", "--topology=v5p:4x4x4"]
  path = CONFIGS / "qwen3_8b_on_policy.py"
  command += [f"--config={path}:{scores}", "--verb=on_policy", "--json"]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  r = json.loads(run.stdout.splitlines()[-1])
  want = {"live": (1, 10.1, 3.1, 3.0, 43.2), "stored": (4, 23.6, 12.5, 11.9, 32.0)}[scores]
  told = (r["every"], *r["seconds_per_round"].values(), r["chip_hours"])
  assert r["fits"] and told == pytest.approx(want, rel=0.02)
  tokens, answers = 5_120 * 256, r["rows_per_round"]
  # 6 operations per weight of the student and token, 2 per weight of the teacher in the step, and
  # those of attention.
  weights = 6 * 7.57e9 + 2 * 32.0e9 * (scores == "live")
  assert r["flops_per_step"] == pytest.approx(weights * tokens, rel=0.15)
  # A decode step reads the weights (without the embedding table), and 36 layers of keys and values.
  read = 2 * 7.57e9 / 4 + answers / 64 * 2 * 2 * 36 * 8 * 128 * 5_120
  assert r["decode"]["step_seconds_bound"] == pytest.approx(read / 2.765e12, rel=0.01)
