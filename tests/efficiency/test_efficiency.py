"""efficiency: published sizes, what decode allocates, what XLA counts, bounds by hand."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import cli, config, registry
from distill_jax.commands import efficiency
from distill_jax.efficiency import formulas, table
from distill_jax.errors import InputError
from distill_jax.generation.unrolled import Unrolled, empty_cache
from distill_jax.hub import export
from distill_jax.models import deepseek_v3, llama, loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import fused_head, params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.preflight import flops
from distill_jax.preflight.chips import CHIPS, Chip
from distill_jax.runtime.workdir import Workdir, read_config
from distill_jax.types import Inputs

R1 = ModelOptions(family="deepseek_v3", shape="deepseek-v3")
QWEN = ModelOptions(family="qwen2", shape="qwen2.5-7b")


def opened(family, shape):
  return loading.open_source(ModelOptions(family=family, shape=shape))


TINY = [
  (family, name)
  for family in tiny.decoder_families()
  for name in registry.load("models", family).CONFIGS
  if name.startswith("tiny")
]

# ---------------------------------------------------------------- bytes


def test_weight_bytes_match_published_checkpoints():
  """Compares with `total_size` in Qwen2.5-7B's index, and with DeepSeek-R1's weight files.

  The latter also contain the multi-token prediction layer, which is added by hand here, and
  headers: 91,991 tensors with 100 to 150 bytes of JSON each.
  """
  assert formulas.weight_bytes(loading.open_source(QWEN), "bfloat16").total == 15_231_233_024
  D, F, E, V = 7_168, 2_048, 256, 129_280
  scales = lambda rows, columns: 4 * -(-rows // 128) * -(-columns // 128)
  matrix = lambda rows, columns: rows * columns + scales(rows, columns)
  mtp = (E + 1) * (2 * matrix(F, D) + matrix(D, F)) + 2 * E * D + 4 * E  # router and its bias
  mtp += matrix(1_536, D) + matrix(128 * 192, 1_536) + matrix(576, D) + matrix(128 * 256, 512)
  mtp += matrix(D, 128 * 128) + 2 * (2 * D + 1_536 + 512)  # norms
  mtp += 2 * (3 * D + 2 * D * D + 2 * V * D)  # its norms, projection and tables
  headers = 688_586_727_753 - mtp - formulas.weight_bytes(loading.open_source(R1), "float8").total
  assert 91_991 * 100 < headers < 91_991 * 150


def test_other_dtypes():
  whole = formulas.weight_bytes(loading.open_source(QWEN), "float32").total
  assert whole == 4 * 7_615_616_512
  r1 = formulas.weight_bytes(loading.open_source(R1), "bfloat16")
  assert r1.total == 2 * 671_026_419_200 + 2 * 58 * 256  # the routers' biases are float32


def test_a_token_reads_the_weights_that_multiply_it():
  """Compares bytes for a batch of 1 in bfloat16, except norms and biases."""
  for spec in (R1, QWEN, ModelOptions(family="qwen3", shape="qwen3-30b-a3b")):
    source = loading.open_source(spec)
    read = formulas.weight_bytes(source, "bfloat16").read(1)
    assert read / 2 == pytest.approx(flops.active_params(source), rel=2e-4)
  tied = opened("llama", "tiny")  # the embedding table is also the head
  w = formulas.weight_bytes(tied, "float32")
  assert w.read(1) == w.read(99) == w.total


@pytest.mark.parametrize("family, name", TINY)
def test_the_cache_size_matches_the_allocation(family, name):
  module, rows, size = registry.load("models", family), 3, 10
  c = module.CONFIGS[name]

  def allocated(key):
    model = module.Model(c, key)
    blocks = [
      params.unstack(jax.tree.map(lambda w, i=i: w[i], getattr(model, stack)))
      for stack, _, n in model.layer_stacks(c)
      for i in range(n)
    ]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return empty_cache(Unrolled(model, tuple(blocks)), rows, size, ComputeConfig(), mesh)

  cache = jax.tree.leaves(jax.eval_shape(allocated, jax.random.key(0)))
  assert sum(x.size for x in cache) == rows * formulas.allocated_cache_numbers(c, size)


def test_cache_sizes_of_windows_and_latents():
  shape = lambda family, name: registry.load("models", family).CONFIGS[name]
  pair = 2 * 2 * 8  # keys and values of 2 heads of 8
  numbers = formulas.cache_numbers
  assert numbers(shape("llama", "tiny"), 10) == 3 * 10 * pair
  assert numbers(shape("llama", "tiny-window"), 10) == 3 * 5 * pair
  assert numbers(shape("llama", "tiny-window"), 4) == 3 * 4 * pair
  assert numbers(shape("gemma3", "tiny"), 10) == (4 + 10 + 4) * pair  # local, global, local
  assert 2 * numbers(shape("deepseek_v3", "deepseek-v3"), 1) == 70_272  # 61 layers of 512 + 64


def test_distinct_experts_match_a_simulation():
  rng = np.random.default_rng(0)
  for n, chosen, batch in ((8, 3, 1), (8, 3, 4), (64, 8, 10)):
    draws = rng.random((2_000, batch, n)).argsort(-1)[..., :chosen].reshape(2_000, -1)
    seen = np.mean([len(np.unique(d)) for d in draws])
    assert flops.distinct(n, chosen, batch) == pytest.approx(seen, rel=0.01)


# ---------------------------------------------------------------- operations

WIDE = {"vocab_size": 4_096, "hidden_size": 256, "intermediate_size": 1_024}
LLAMA = dataclasses.replace(llama.TINY, **WIDE, head_dim=64)
LATENT = dataclasses.replace(  # dense layers only: XLA counts all experts
  deepseek_v3.TINY,
  **WIDE,
  head_dim=96,
  q_lora_rank=128,
  kv_lora_rank=128,
  qk_nope_head_dim=64,
  qk_rope_head_dim=32,
  v_head_dim=64,
  first_k_dense_replace=3,
)


@pytest.mark.parametrize("family, shape", [("llama", LLAMA), ("deepseek_v3", LATENT)])
def test_decode_flops_match_xla(family, shape, monkeypatch):
  """Uses the last of 128 positions, which attends to all positions with computed scores."""
  module, S = registry.load("models", family), 128
  monkeypatch.setitem(module.CONFIGS, "wide", shape)

  def one(model, cache, tokens_BT):
    blocks = [
      params.unstack(jax.tree.map(lambda w, i=i: w[i], getattr(model, stack)))
      for stack, _, n in model.layer_stacks(shape)
      for i in range(n)
    ]
    read = Inputs(tokens_BT, jnp.full_like(tokens_BT, S - 1), jnp.ones_like(tokens_BT))
    out, cache = model.decode_step(blocks, read, cache, ComputeConfig())
    return fused_head.logits(out.hidden_BTD, out.head_VD), cache

  model = jax.eval_shape(lambda key: module.Model(shape, key), jax.random.key(0))
  kept = {"k": (1, 2, 64, S), "v": (1, 2, S, 64)}
  if family == "deepseek_v3":
    kept = {"latent": (1, 128 + 32, S)}
  layer = {n: (jax.ShapeDtypeStruct(s, jnp.float32),) for n, s in kept.items()}
  cache = (layer,) * 3
  token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  counted = jax.jit(one).lower(model, cache, token).compile().cost_analysis()["flops"]
  ours = flops.decode_flops(opened(family, "wide"), S)
  assert ours == pytest.approx(counted, rel=0.02)


def test_prefill_counts_the_head_once():
  source, S = opened("llama", "tiny"), 16
  one = flops.forward_flops(source, 1, S)
  want = one.total - (S - 1) * 2 * 256 * 32  # 256 tokens, width 32
  assert formulas.prefill_flops(source, S) * S == want


# ---------------------------------------------------------------- bounds


def test_bounds_match_hand_computation():
  """With 4 experts, 2 per token, one row reads 2 experts and two rows read 3."""
  chip = Chip("v5e", flops=100.0, hbm=50, hbm_bandwidth=10.0, ici=1.0, dcn=1.0, grids=())
  served = formulas.ServingCost(formulas.WeightBytes(90, 30, 60, 4, 2), cache=10, flops=5.0)
  assert served.min_chips(chip, 1) == 2 and served.min_chips(chip, 2) == 3  # 100 and 110 bytes
  row = served.decode_bound(chip, 2)
  assert row["experts_read"] == 3 and row["bytes_read"] == 30 + 45 + 20
  assert row["step_seconds"] == pytest.approx(95 / 3 / 10) and row["bound_by"] == "hbm"
  assert row["tokens_per_second"] == pytest.approx(2 * 3 * 10 / 95)
  assert row["tokens_per_second_per_chip"] == pytest.approx(2 * 10 / 95)
  busy = dataclasses.replace(served, flops=1e4).decode_bound(chip, 1)
  assert busy["bound_by"] == "compute" and busy["step_seconds"] == 50


def test_a_chip_of_two_devices_has_the_memory_of_both():
  gib = {name: chip.memory / 2**30 for name, chip in CHIPS.items()}
  for name, published in {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}.items():
    assert gib[name] == pytest.approx(published, rel=0.05)


# ---------------------------------------------------------------- the verb


def of(**keys):
  c = config.Config(teacher=R1, student=config.StudentOptions(**vars(QWEN)))
  return dataclasses.replace(c, efficiency=config.EfficiencyOptions(**keys))


def test_r1_against_seven_billion(tmp_path):
  r = efficiency.run(of(teacher_dtype="float8", batch_sizes=(1, 64)), tmp_path)
  ratios = r["ratios"]
  assert ratios["memory"]["same_dtype"] == pytest.approx(671.0264 / 7.6156, rel=1e-4)
  assert ratios["memory"]["weights"] == pytest.approx(673.15 / 15.231, rel=1e-4)
  t, s = (r["models"][who]["decode_bounds"] for who in ("teacher", "student"))
  for i, row in enumerate(ratios["throughput_per_chip"]):
    assert row["ratio"] == pytest.approx(t[i]["bytes_read"] / s[i]["bytes_read"])  # memory-bound
  latency = ratios["latency"]
  assert latency["same_chips"] == pytest.approx(ratios["throughput_per_chip"][0]["ratio"])
  assert latency["own_chips"] == pytest.approx(latency["same_chips"] / t[0]["chips"])
  assert r["measured"] is r["quality"] is None
  assert json.loads((tmp_path / "efficiency.json").read_text()) == r
  text = table.text(r)
  assert text.startswith(
    "memory: 1/88.1 at equal dtype, 1/44.2 when served (float8 for the teacher, "
  )


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"chip": "h100"}, "efficiency.chip is 'h100'; expected one of v4, "),
    ({"student_dtype": "int4"}, "efficiency.student_dtype is 'int4'; expected one of float32, "),
    (
      {"context": 32_769},
      "context is 32769; expected a number from 1 to 32768, the maximum length of the student",
    ),
    ({"context": 0}, "context is 0"),
    ({"batch_sizes": ()}, "batch_sizes is (); expected one or more positive numbers"),
    ({"batch_sizes": (8, 0)}, "batch_sizes is (8, 0)"),
    ({"measure": True}, "teacher.source is ''; expected the weights to run"),
  ],
)
def test_an_invalid_option_is_refused(keys, message, tmp_path):
  with pytest.raises(InputError) as refused:
    efficiency.run(of(**keys), tmp_path)
  assert message in str(refused.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"models": 3}', '{"evals": {"gsm8k": 3}}'])
def test_a_damaged_evaluation(text, tmp_path):
  (tmp_path / "evaluation.json").write_text(text)
  with pytest.raises(InputError, match="does not contain the results of `evaluate`"):
    efficiency.run(of(), tmp_path)


CONFIG = """
from distill_jax import config
def get_config():
  c = config.base()
  c.teacher.source = c.student.source = {model!r}
  c.student.keep_layers = (0, 2)
  e = c.efficiency
  e.decode.steps, e.decode.prefill_chunk = 2, 8
  e.measure, e.context, e.batch_sizes, e.rounds = True, 21, (4,), 2
  return c
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """(workdir, result) of a measurement of two tiny models."""
  path = tmp_path_factory.mktemp("efficiency")
  model = jax.eval_shape(lambda key: llama.Model(llama.TINY, key), jax.random.key(0))
  model = jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, 0.01, x.dtype)), model)
  export.export_model(
    model, path / "model", tokenizer=None, generation={}, card="", dtype="float32"
  )
  (path / "conf.py").write_text(CONFIG.format(model=str(path / "model")))
  (path / "run").mkdir()
  sums = {"small": {"acc": {"value": 0.5, "low": 0.25, "high": 0.75}}}
  evaluation = {"models": {"teacher": {"ce": 1.5, "bytes": 9}}, "evals": {"sums": sums}}
  (path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
  argv = ["distill-jax", "efficiency", f"--config={path}/conf.py", f"--workdir={path}/run"]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", argv)
    cli.main(argv)
  return path / "run", json.loads((path / "run" / "efficiency.json").read_text())


def test_both_models_are_measured(measured):
  _, r = measured
  m = r["measured"]
  assert (m["prompt"], m["new"], m["device"]) == (13, 8, "cpu")
  table, layer, norm = 256 * 32, 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32, 32
  for who, layers in (("teacher", 3), ("student", 2)):
    one, computed = m["models"][who], r["models"][who]
    assert one["weight_bytes"] == 4 * (table + layers * layer + norm)
    assert computed["weight_bytes"] * 2 == one["weight_bytes"]  # bfloat16 there, float32 here
    assert [b["batch_size"] for b in one["batches"]] == [4]
    for b in one["batches"]:
      assert b["cache_bytes"] == b["batch_size"] * 4 * layers * 21 * 2 * 2 * 8
      assert b["cache_bytes"] == 2 * b["batch_size"] * computed["decoder_cache_bytes"]
      for phase in ("prefill", "decode"):
        rate = b[f"{phase}_tokens_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["most"]
  assert [row["batch_size"] for row in m["ratios"]] == [4]


def test_quality_is_read_from_evaluation_json(measured):
  assert measured[1]["quality"] == {
    "teacher": {"ce": 1.5},
    "small": {"sums.acc": {"value": 0.5, "low": 0.25, "high": 0.75}},
  }


def test_the_printed_table(measured):
  lines = table.text(measured[1]).splitlines()
  assert any(line.startswith("speed (measured on this machine): ") for line in lines)
  assert any(line.split() == ["teacher", "ce", "1.5"] for line in lines)
  assert any("sums.acc 0.5 (0.25 to 0.75)" in line for line in lines)
  assert any(line.endswith("model, 2 of its layers") for line in lines)


def test_a_workdir_can_be_measured_with_other_options(measured):
  workdir, _ = measured
  c = read_config(workdir)
  others = dataclasses.replace(c, efficiency=config.EfficiencyOptions())
  assert others.efficiency != c.efficiency
  with Workdir(workdir, others) as path:
    assert path == workdir


def test_a_context_too_short_for_a_measurement_is_refused(measured, tmp_path):
  c = read_config(measured[0])
  short = dataclasses.replace(c, efficiency=dataclasses.replace(c.efficiency, context=15))
  with pytest.raises(
    InputError,
    match="efficiency.context is 15; expected at least 16, i.e. 8 times efficiency.decode.steps",
  ):
    efficiency.run(short, tmp_path)
