"""Preflight: its counts against counts by hand, and its programs against those that would run."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_images

from distill_jax import config
from distill_jax.commands import preflight, record
from distill_jax.errors import InputError
from distill_jax.models import llama, loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import fused_head, params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.preflight import (
  chips,
  compiler,
  estimate,
  flops,
  programs,
  roofline,
  slices,
  table,
  topology,
)
from distill_jax.records import tf_example
from distill_jax.records.recorder import planned_manifest
from distill_jax.training import loader
from distill_jax.training import stores as training_stores
from distill_jax.types import Inputs

CONFIGS = Path(__file__).parents[2] / "configs"
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: .[tpu] has it"
)


# ---------------------------------------------------------------- FLOPs


def test_flops_agree_with_xla_for_one_layer(monkeypatch):
  """XLA counts the body of a loop once, so the model has one layer. Masked scores count, too."""
  shape = dataclasses.replace(
    llama.TINY,
    vocab_size=4_096,
    hidden_size=256,
    intermediate_size=1_024,
    num_hidden_layers=1,
    head_dim=64,
  )
  monkeypatch.setitem(llama.CONFIGS, "one", shape)
  B, T = 2, 64

  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
  model = jax.eval_shape(lambda key: llama.Model(shape, key), jax.random.key(0))

  def forward(model, tokens_BT):
    inputs = Inputs(tokens_BT, jnp.arange(T)[None].repeat(B, 0), jnp.ones_like(tokens_BT))
    out = model(inputs, ComputeConfig())
    return fused_head.logits(out.hidden_BTD, out.head_VD)

  counted = jax.jit(forward).lower(model, tokens).compile().cost_analysis()["flops"]
  source = loading.open_source(ModelOptions(family="llama", shape="one"))
  ours = flops.forward_flops(source, B, T)
  unmasked = ours.attention * 2 * T / (T + 1)
  assert ours.weights + unmasked + ours.head == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
  "family, shape, billions",
  [
    (
      "deepseek_v3",
      "deepseek-v3",
      37.6,
    ),  # arXiv:2412.19437: 37 activated, with one embedding table
    ("qwen3", "qwen3-30b-a3b", 3.35),  # arXiv:2505.09388: 3.3 activated
    ("qwen2", "qwen2.5-7b", 7.61),  # all parameters, arXiv:2412.15115
  ],
)
def test_active_weights_agree_with_published_numbers(family, shape, billions):
  source = loading.open_source(ModelOptions(family=family, shape=shape))
  table = source.config.vocab_size * source.config.hidden_size
  active = flops.active_params(source)
  assert (active + table) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
  "family, shape",
  [
    ("llama", "tiny"),
    ("llama", "tiny-window"),
    ("gemma3", "tiny"),
  ],
)
def test_attended_pairs_respect_the_window(family, shape):
  c = loading.open_source(ModelOptions(family=family, shape=shape)).config
  T = 11
  for layer in range(c.num_hidden_layers):
    kind = getattr(c, "layer_types", [""] * 9)[layer]
    window = T if kind == "full_attention" else getattr(c, "sliding_window", None) or T
    pairs = sum(0 <= t - s < window for t in range(T) for s in range(T))
    assert flops.attended_pairs(c, layer, T) == pairs


def test_flops_of_a_step_computed_by_hand():
  """tiny: D 32, F 64, 3 layers of 4 and 2 heads of 8, 256 tokens; 4 rows of 32."""
  c = config.resolve(model_config())
  layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v, o, gate and up and down
  tokens, pairs = 4 * 32, 4 * 3 * 32 * 33 // 2
  want = {
    "layers": 3 * 2 * tokens * 3 * layer,
    "attention": 3 * 2 * pairs * 4 * 16,
    "head": 3 * 2 * tokens * 256 * 32,
  }
  again = lambda **compute: flops.step_flops(
    dataclasses.replace(c, student=dataclasses.replace(c.student, **compute)), "train", 4
  )["recomputed"]
  found = flops.step_flops(c, "train", 4)
  assert {name: found[name] for name in want} == want
  assert again(attention="xla") == 0 and again() == want["attention"] / 6  # of 3 passes, 1 / 2
  assert again(attention="xla", remat="full") == (want["layers"] + want["attention"]) / 3
  assert again(attention="xla", remat="dots") == want["attention"] / 3
  assert sum(flops.step_flops(c, "record", 4).values()) == sum(want.values()) / 3
  online = dataclasses.replace(c, train=dataclasses.replace(c.train, online=True))
  assert flops.step_flops(online, "train", 4)["teacher"] == sum(want.values()) / 3


# ---------------------------------------------------------------- programs


def model_config():
  c = config.base()
  c.teacher.shape = c.student.shape = "tiny"
  c.data.seq_len = 32
  c.data.sequences = 20
  c.records.n = 15
  c.records.batch_size = c.train.batch_size = 4
  c.train.steps = 10
  c.train.chunk = 16
  c.losses.soft = config.loss("kd")
  return c


@pytest.mark.parametrize(
  "records",
  [
    {"logp": True},
    {"kind": "topk", "taps": (1,), "taps_width": 8},
  ],
)
def test_the_planned_batch_has_the_shapes_of_the_loader(tmp_path, records):
  c = tiny.tiny(tmp_path)
  c.teacher.source = ""
  c.records.update(records)
  c = config.resolve(c)
  (tmp_path / "records").mkdir()
  record.run(c, tmp_path / "records")
  stores = training_stores.open_stores(c)
  real = next(loader.batches(stores, batch_size=4, seed=0))
  mesh = sharding.make_mesh(fsdp=4)
  about = programs.planned_manifest(c)
  ours = programs.planned_batch(about, programs.placeholder_text(about), ["teacher"], None, 4, mesh)
  shape = lambda x: (x.shape, np.dtype(x.dtype))
  assert jax.tree.map(shape, ours) == jax.tree.map(shape, real)


@pytest.mark.parametrize(
  "verb, changes",
  [
    ("record", {}),
    ("train", {"train.online": True}),
    ("train", {"student.train": "lora", "student.lora.rank": 2}),
  ],
)
def test_argument_bytes_agree_with_the_compiler(verb, changes):
  c = model_config()
  c.update_from_flattened_dict(changes)
  program = programs.lower(config.resolve(c), verb, sharding.make_mesh(fsdp=2, tensor=2))
  memory = program.lowered.compile().memory_analysis()
  given = sum(program.arguments.values())
  assert given == pytest.approx(memory.argument_size_in_bytes, abs=200)  # scalars and keys


def test_argument_bytes_without_compiling():
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  for rank in (0, 2):
    c = model_config()
    c.student.train, c.student.lora.rank = "lora" if rank else "whole", rank
    c = config.resolve(c)
    for verb in ("train", "record"):
      told = programs.lower(c, verb, mesh).arguments
      want = sum(n for name, n in told.items() if name != "batch")
      assert estimate.argument_bytes(c, verb, mesh) == pytest.approx(want, rel=0.01)


def test_a_named_shape_replaces_the_source():
  c = model_config()
  c.teacher.source = "hub:somebody/model"
  c = programs.without_weights(config.resolve(c))
  assert c.teacher.source == "" and params.count(loading.open_source(c.teacher).abstract)


R1 = [
  (path, seq_len)
  for path in sorted(CONFIGS.glob("r1_*.py"))
  for seq_len in ("4096", "32768")
  if seq_len == "32768" or "r1_sft" not in path.stem  # configs/r1_sft_*.py have one length
]


@pytest.mark.parametrize(("path", "seq_len"), R1, ids=lambda x: getattr(x, "stem", x))
def test_the_r1_configs_fit_the_slices_in_their_docstrings(path, seq_len, monkeypatch):
  """The slice has the size of the mesh, and the batch is divisible by it."""
  monkeypatch.syspath_prepend(CONFIGS)
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  made = module.get_config() if "r1_sft" in path.stem else module.get_config(seq_len)
  c = programs.without_weights(config.resolve(made))
  verb = "record" if path.stem == "r1_record" else "train"
  model = c.teacher if verb == "record" else c.student
  assert c.data.seq_len == int(seq_len) <= loading.open_source(model).config.max_position_embeddings
  assert estimate.total_tokens(c, verb) == 2**33 >> (verb == "record")
  size = chips.parse(re.search(r"--topology=(\S+)", module.__doc__)[1])[1]
  data, fsdp, tensor = sharding.mesh_shape(**vars(c.mesh), devices=size)
  rows = c.records.batch_size if verb == "record" else c.train.batch_size
  assert rows % (data * fsdp) == 0 and data * fsdp * tensor == size


# ---------------------------------------------------------------- estimates


def test_estimated_store_bytes_are_close_to_what_the_codec_writes():
  """12 entries for 63 points with ids from the whole vocabulary, the worst case."""
  rng, T, V = np.random.default_rng(0), 512, 151_936
  about = dataclasses.replace(
    planned_manifest(config.resolve(model_config()).records, V, 1, T), n=63
  )
  count = rng.multinomial(63 - 12, np.ones(12) / 12, T) + 1
  ids = np.sort(rng.integers(0, V, (T, 12)), -1)
  zeros = np.zeros(T, np.float32)
  row = {
    "tokens_T": rng.integers(0, V, T),
    "segments_T": np.ones(T, int),
    "mask_T": np.ones(T, bool),
    "ids_TN": np.stack([np.repeat(i, n) for i, n in zip(ids, count, strict=True)]),
    "argmax_T": ids[np.arange(T), count.argmax(1)],
    "label_logp_T": zeros,
    "entropy_T": zeros,
  }
  written = sum(map(len, tf_example.encode(0, row, about).values())) / T
  assert estimate.record_bytes_per_token(about) == pytest.approx(written, rel=0.15)


def test_the_bound_is_that_of_the_slowest_resource():
  chip = chips.CHIPS["v5p"]
  sent = {"all-gather": int(600e9), "dcn all-reduce": int(6.25e9)}
  b = roofline.bound(chip, 64, 64, {"layers": 459e12 * 64 * 3}, 2.765e12 * 2, sent)
  assert (b.compute, b.hbm, b.ici, b.dcn) == pytest.approx((3, 2, 1, 1))
  assert b.seconds == 3 and b.by == "compute"
  two = roofline.bound(chips.CHIPS["tpu7x"], 4, 8, {}, 0.0, {"all-gather": int(300e9)})
  assert two.ici == pytest.approx(1)  # a chip's two devices share its links


class TooBig:
  def __init__(self, message):
    self.message = message

  def compile(self, compiler_options=None):
    raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_is_too_large_is_reported():
  told = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(22.80G) exceeds available HBM (15.75G)."
  )
  memory, compiled = compiler.compile_step(
    programs.LoweredStep(TooBig(told), {"parameters": 2**30}, 4)
  )
  assert compiled is None and memory.peak == int(22.8 * 2**30) == memory.temporaries + 2**30
  with pytest.raises(jax.errors.JaxRuntimeError):
    compiler.compile_step(programs.LoweredStep(TooBig("INTERNAL: something else"), {}, 4))


# ---------------------------------------------------------------- refusals


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
  with pytest.raises(InputError, match="--verb is 'export'; expected 'train' or 'record'"):
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


# ---------------------------------------------------------------- the verb

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


@needs_libtpu
def test_commands_for_a_slice_run_at_the_same_time(tmp_path):
  """Runs the command line in four processes at once; checks the text and the JSON."""
  path = tmp_path / "c.py"
  path.write_text(CONFIG)
  both = (
    start(path, "--topology=v5e:2x2", "--json"),
    start(path, "--topology=v5e:2x2", "--verb=record"),
    start(path, "--topology=v5e:2x2", "--num_slices=2"),
    start(path, "--topology=v5e:2x2", "--num_slices=2", "--config.mesh.data=2", "--json"),
  )
  said = [p.communicate(timeout=200) for p in both]
  (out, err), (words, more), (_, refused), (two, _) = said
  assert [p.returncode for p in both] == [0, 0, 2, 0], err + more
  r = json.loads(out.splitlines()[-1])
  assert all(r[key] is not None for key in KEYS) and r["fits"] and r["chips"] == 4
  assert r["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
  parts, peak = sum(r["bytes_per_device"].values()), r["peak_bytes_per_device"]
  assert 0.9 * peak < parts <= peak  # the layouts of small arguments are padded
  assert r["flops_per_step"] == sum(r["flops"].values()) - r["flops"]["recomputed"]
  assert 0 < r["mfu_bound"] <= 1
  assert r["tokens_per_second_bound"] == pytest.approx(8 * 128 / r["step_seconds_bound"])
  assert r["store_bytes"] == pytest.approx(100 * 128 * r["store_bytes_per_token"], rel=0.01)
  assert r["chip_hours"] == pytest.approx(10 * r["step_seconds_bound"] * 4 / 3600)
  assert words.startswith("Fits: ") and "records take about" in words
  assert "mesh.data is 1 and there are 2 slices" in refused
  slow = json.loads(two.splitlines()[-1])
  assert slow["chips"] == 8 and slow["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
  assert set(r["collectives"]) | {"dcn all-reduce"} == set(slow["collectives"])
  # Each device sends its part of the gradient, once, and a few sums.
  gradient = slow["bytes_per_device"]["parameters"]
  assert gradient / 4 < slow["collectives"]["dcn all-reduce"] < 1.2 * gradient


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
  mesh_of = lambda axes, name, _: sharding.make_mesh(**vars(axes))
  monkeypatch.setattr(topology, "make_mesh", mesh_of)
  memory = compiler.Memory(1, 0, 1, 2)
  monkeypatch.setattr(compiler, "compile_step", lambda *a: (memory, "compiled"))
  c = model_config()
  c.mesh.fsdp = 16
  found = slices.smallest_slice(config.resolve(c), "train", topology.Hardware("v5e:4x4"), fits=True)
  assert found == {
    "topology": "v5e:2x2",
    "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
    "proven": True,
    "peak_bytes_per_device": 2,
  }


@needs_libtpu
def test_libtpu_prints_nothing_without_a_tpu():
  script = "from distill_jax import cli; cli.hush_libtpu(); import jax; jax.devices()"
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_PLATFORMS", "TPU_"))}
  env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = (
    "true"  # otherwise the lock of another process would suppress the output
  )
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
