"""`shrink`: one student, the search for a student, and errors."""

import dataclasses
import json

import pytest
import slow
import tiny
import tiny_checkpoints

from distill_jax import config, registry
from distill_jax.commands import shrink as command
from distill_jax.commands.shrink import run as shrink
from distill_jax.errors import InputError, Preempted
from distill_jax.models import loading
from distill_jax.pruning import candidates, measured_teacher, search, shapes, table, windows
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.runtime import json_io
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop
from distill_jax.training.metric_writer import read_metrics

SHAPE = dataclasses.replace(tiny_checkpoints.CONFIG, vocab_size=256, tie_word_embeddings=True)


def tiny_config(path, **asked):
  """Returns a config with a teacher in a folder, since random weights would be compiled."""
  c = tiny.tiny(path)
  if not (path / "teacher").exists():
    weights = {n: 0.2 * x + ("norm" in n) for n, x in tiny_checkpoints.tensors(SHAPE).items()}
    tiny_checkpoints.write_folder(path / "teacher", SHAPE, weights)
  c.teacher.source, c.teacher.shape = str(path / "teacher"), ""
  c.shrink.dtype = "float32"
  c.shrink.sequences = c.evaluate.sequences = c.evaluate.batch_size = 4
  c.train.records, c.losses = (), {}
  for key, value in asked.items():
    setattr(c.shrink, key, value)
  return c


def run(c, workdir):
  resolved = config.resolve(c)
  with Workdir(workdir, resolved) as path:
    return shrink(resolved, path)


def test_a_student_and_its_table(tmp_path):
  c = tiny_config(tmp_path, layers=2, heads=2, intermediate=32, factorise={"o_proj": 4})
  result = run(c, tmp_path / "run")
  assert json.loads((tmp_path / "run" / "shrink.json").read_text()) == result
  models, kept = result["models"], result["kept"]
  made = loading.open_source(config.resolve(c).teacher).config
  source = loading.open_source(config.ModelOptions(source=result["dir"]))
  family, shape = source.family, source.config
  assert (shape.num_hidden_layers, shape.num_attention_heads, shape.intermediate_size) == (2, 2, 32)
  assert models["teacher"]["parameters"] == shapes.cost(family, made).parameters
  assert models["student"]["parameters"] == shapes.cost(family, shape).parameters
  assert models["random"]["ce"] == pytest.approx(5.545, abs=0.2)  # ln 256
  assert all(row["bytes"] == 4 * row["parameters"] for row in models.values())
  assert len(kept["layers"]["numbers"]) == 2 and kept["heads"]["of"] == 4
  factors = result["factorised"]["layers.o"]
  assert factors["bytes"] == 4 * 2 * 32 * 16 > factors["bytes_as_factors"] == 4 * 2 * 4 * (32 + 16)
  text = table.text(result)
  assert "heads: 2 of 4" in text and "rank 4 of 16" in text and "hidden" not in text
  card = (tmp_path / "run" / "model" / "README.md").read_text()
  assert "heads: 2 of 4" in card and f"{models['student']['ce']:.4g}" in card
  before = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
  assert run(c, tmp_path / "run") == result  # finished earlier
  assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before
  c.shrink.dir = result["dir"]
  with pytest.raises(InputError, match="export does not overwrite"):
    run(c, tmp_path / "again")


def test_a_command_that_is_killed_after_its_export_has_finished(tmp_path, monkeypatch):
  c, real = tiny_config(tmp_path, layers=2), measured_teacher.export_model

  def killed(*args, **options):
    real(*args, **options)
    raise KeyboardInterrupt

  monkeypatch.setattr(measured_teacher, "export_model", killed)
  with pytest.raises(KeyboardInterrupt):
    run(c, tmp_path / "run")
  monkeypatch.undo()
  result = run(c, tmp_path / "run")
  assert result["dir"] == str(tmp_path / "run" / "model")
  assert result["kept"]["layers"]["of"] == SHAPE.num_hidden_layers


def test_the_search(tmp_path, monkeypatch):
  """Interrupted before training, run again, and run a third time after the end."""
  c = tiny_config(tmp_path, target_params=36_000.0, steps=3)
  c.optim.warmup_steps = 50
  trained, once, kinds = [], loop.train, candidates.propose
  monkeypatch.setattr(candidates, "propose", lambda *a: {"depth": kinds(*a)["depth"]})

  def stopped(conf, workdir):
    raise Preempted("stopped")

  monkeypatch.setattr(loop, "train", stopped)
  with pytest.raises(Preempted):
    run(c, tmp_path / "run")
  made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/candidates/*/model/*")}
  monkeypatch.setattr(loop, "train", lambda conf, w: trained.append(w) or once(conf, w))
  result = run(c, tmp_path / "run")
  row = result["candidates"]["depth"]
  assert made and made == {p: p.stat().st_mtime_ns for p in made}  # not made again
  assert abs(row["parameters"] / 36_000 - 1) <= 0.1 and row["kept"]["layers"]["kept"] == 3
  assert loading.open_source(config.ModelOptions(source=row["dir"])).config.num_hidden_layers == 3
  assert [m["step"] for m in read_metrics(row["run"])] == [0, 1, 2]
  assert row["ce"] != row["ce_before"] and len(trained) == 1
  assert run(c, tmp_path / "run") == result and len(trained) == 1


def test_the_best_of_the_search_is_recommended(tmp_path, monkeypatch):
  ce, made = {"depth": 3.0, "inner": 2.5, "width": 2.75}, []
  kept = {"layers": {"kept": 2, "of": 4}}
  row = {"parameters": 7, "bytes": 14, "ce": 9.0}

  def make(conf, teacher, proposed, folders):
    for name, f in folders.items():
      made.append(name)
      models = {"teacher": row, "student": row}
      json_io.write_json(f / "made.json", {"kept": kept, "dir": "model", "models": models})

  score = lambda conf, teacher, folders, rates: [
    json_io.write_json(f / "score.json", {"ce": ce[name]}) for name, f in folders.items()
  ]
  monkeypatch.setattr(search, "make", make)
  monkeypatch.setattr(command, "with_records", lambda conf, w: conf)
  monkeypatch.setattr(search, "distil", lambda conf, folder: None)
  monkeypatch.setattr(search, "score", score)
  monkeypatch.setattr(search, "propose", lambda *args: dict.fromkeys(ce, ShrinkOptions()))
  result = run(tiny_config(tmp_path, target_params=9.0), tmp_path / "run")
  assert made == list(ce) and result["recommended"] == "inner"
  names = [line.split()[0] for line in table.text(result).splitlines()[2:5]]
  assert names == ["inner", "width", "depth"]  # in order of the held-out loss


def test_a_target_rate_is_converted_to_a_size(tmp_path, monkeypatch):
  """A rate is inversely proportional to the parameters that a token reads."""
  monkeypatch.setattr(search, "_decode_rate", lambda *args: 10.0)
  c = tiny_config(tmp_path, target_decode_rate=15.0)
  resolved = config.resolve(c)
  source = loading.open_source(resolved.teacher)
  proposed = search.propose(resolved, source, tmp_path, "target_decode_rate")
  family, shape = source.family, source.config
  for s in proposed.values():
    now = shapes.narrowed(s, family, shape).keep_layers(tuple(range(s.layers)))
    ratio = shapes.cost(family, shape).active / shapes.cost(family, now).active
    assert ratio == pytest.approx(1.5, rel=0.12)
  monkeypatch.setattr(
    search, "_decode_rate", lambda *args: 99.0
  )  # not called: the rate is already measured
  assert search.propose(resolved, source, tmp_path, "target_decode_rate") == proposed
  c.shrink.target_decode_rate = 10.0
  with pytest.raises(
    InputError, match="target_decode_rate is 10.0; expected more than 10 tokens per second"
  ):
    search.propose(config.resolve(c), source, tmp_path, "target_decode_rate")


FAMILIES = [
  (name, shape)
  for name in tiny.decoder_families()
  for shape in registry.load("models", name).CONFIGS
  if shape in ("tiny", "tiny-moe")
]


FAST = (("llama", "tiny"), ("deepseek_v3", "tiny"), ("qwen3", "tiny-moe"))


@pytest.mark.parametrize("model", slow.all_but(FAST, FAMILIES), ids=" ".join)
def test_shapes_are_proposed_for_every_family(model):
  family, name = model
  shape = registry.load("models", family).CONFIGS[name]
  size = lambda c: shapes.cost(family, c).parameters
  wanted = 0.6 * size(shape)
  target = candidates.Target(size, wanted, "parameters", "target_params", wanted)
  proposed = candidates.propose(ShrinkOptions(), family, shape, target)
  assert len(proposed) > 1
  for s in proposed.values():
    now = shapes.narrowed(s, family, shape)
    assert size(now.keep_layers(tuple(range(s.layers)))) == pytest.approx(wanted, rel=0.25)


def refused(family, name, **asked):
  shape = registry.load("models", family).CONFIGS[name]
  with pytest.raises(InputError) as error:
    shapes.narrowed(ShrinkOptions(**asked), family, shape)
  assert str(error.value).count(".") <= 4 and "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  "family, name, asked, says",
  [
    ("llama", "tiny", {"heads": 3}, "shrink.heads is 3; expected a multiple of 2 up to 4"),
    ("llama", "tiny", {"heads": 5}, "heads is 5; expected at most 4, the teacher's value"),
    ("llama", "tiny", {"heads": -1}, "heads is -1; expected a positive number, or 0"),
    ("llama", "tiny", {"heads": 4, "kv_heads": 1}, "a multiple of 1 up to 2"),
    ("llama", "tiny", {"experts": 2}, "experts is 2; expected 0, since this llama model"),
    ("llama", "tiny", {"expert_intermediate": 2}, "is 2; expected 0, since this llama model"),
    ("llama", "tiny", {"layers": 4, "layers_by": "loss"}, "layers_by='even'"),
    ("llama", "tiny", {"layers": 2, "layers_by": "odd"}, "one of even, ends"),
    ("llama", "tiny", {"hidden": 64}, "hidden is 64; expected at most 32"),
    ("qwen3", "tiny-moe", {"intermediate": 32}, "is 32; expected 0, since this qwen3 model"),
    ("qwen3", "tiny-moe", {"experts": 2}, "num_experts_per_tok is 3; expected at most 2"),
    (
      "qwen3",
      "qwen3-8b",
      {"kv_heads": 3, "kv_heads_by": "merge"},
      "kv_heads is 3; expected a divisor of 8",
    ),
    ("deepseek_v3", "tiny", {"kv_heads": 2}, "is 2; expected 0, since this deepseek_v3 model"),
    (
      "deepseek_v3",
      "tiny",
      {"experts": 6},
      "experts is 6; expected a multiple of 4, the number of groups",
    ),
    ("deepseek_v3", "tiny", {"experts": 4}, "expected a multiple of n_group, 4, with at least 2"),
    ("gemma3", "tiny", {"sequences": 0}, "sequences is 0; expected a positive number"),
  ],
)
def test_unsupported_shapes_raise(family, name, asked, says):
  assert says in refused(family, name, **asked)


@pytest.mark.parametrize(
  "family, name, says",
  [
    ("gemma3", "tiny", "expected 0 for this gemma3 model, .* only for llama, qwen2, qwen3"),
    ("deepseek_v3", "tiny", "expected 0 for this deepseek_v3 model"),
    ("qwen3", "tiny-moe", "without experts"),
    ("llama", "tiny-window", "the teacher already has a window of 5"),
  ],
)
def test_unsupported_windows_raise(family, name, says):
  with pytest.raises(InputError, match=says):
    windows.windowed(
      ShrinkOptions(window=4, global_every=2), registry.load("models", family).CONFIGS[name]
    )


@pytest.mark.parametrize("every, see_all", [(2, [1, 3]), (0, [])])
def test_a_student_with_windows(every, see_all, tmp_path):
  c = tiny_config(tmp_path, window=8, global_every=every)
  result = run(c, tmp_path / "run")
  source = loading.open_source(config.ModelOptions(source=result["dir"]))
  family, shape = source.family, source.config
  assert (family, shape.sliding_window) == ("qwen2", 8)
  assert [i for i, kind in enumerate(shape.layer_types) if kind == "full_attention"] == see_all
  layers_seen = "all layers except: 1 3" if see_all else "all layers\n"
  assert f"window: 8 of {shape.max_position_embeddings} by {layers_seen}" in table.text(result)
  ce = {name: row["ce"] for name, row in result["models"].items()}
  assert ce["student"] != ce["teacher"] and ce["random"] == pytest.approx(5.545, abs=0.2)


@pytest.mark.parametrize(
  "asked, says",
  [
    ({}, "does not set a size of the student"),
    ({"layers": 2, "target_params": 1e4}, "shrink.layers is 2; expected .*target_params is set"),
    (
      {"target_bytes": 1e4, "target_params": 1e4},
      "shrink.target_bytes is 10000.0; expected 0, because shrink.target_params is set",
    ),
    ({"target_params": 1e9}, "is 1000000000.0; expected a target below the teacher's 45,344 param"),
    ({"target_params": 100.0}, "is 100.0; .*needs 100 parameters.* and the smallest one 1,"),
    ({"target_params": -5.0}, "is -5.0; expected a positive number"),
    ({"window": -8}, "window is -8; expected a positive number, or 0"),
    (
      {"window": 8, "global_every": 5},
      "global_every is 5; expected a number from 2 to 4, the number of layers",
    ),
    ({"window": 8, "global_every": 2, "layers": 1}, "global_every is 2; .* the number of layers"),
    (
      {"window": 8, "global_every": 1},
      "global_every is 1; expected at least 2, since with 1 all layers have full",
    ),
    ({"window": 8, "global_every": -1}, "global_every is -1; expected at least 2, or 0"),
    (
      {"factorise": {"x_proj": 2}},
      "factorise is 'x_proj'; expected names among down_proj, gate_proj",
    ),
    (
      {"factorise": {"k_proj": 16}},
      "factorise.k_proj is 16; expected a rank from 1 to 15 for layers.k",
    ),
  ],
)
def test_bad_sizes_and_targets_raise(asked, says, tmp_path):
  with pytest.raises(InputError, match=says):
    run(tiny_config(tmp_path, **asked), tmp_path / "run")
  assert not (tmp_path / "run" / "model").exists()
