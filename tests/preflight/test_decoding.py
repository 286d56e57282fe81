"""`preflight --verb=generate`: bytes and bounds by hand, and the R1 configs on v5p:4x4x4."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import jax
import pytest
from preflight_config import CONFIGS, model_config

from distill_jax import config
from distill_jax.commands import preflight
from distill_jax.errors import InputError
from distill_jax.generation import placement
from distill_jax.models import loading
from distill_jax.nn import params
from distill_jax.preflight import chips, decoding, topology

CHIP = chips.CHIPS["v5e"]


def estimated(monkeypatch, mesh=(1, 2, 2), **changes):
  """Returns the estimate for a tiny teacher on four virtual devices, and its model's shapes."""
  monkeypatch.setattr(topology, "prepare", lambda: None)
  devices = jax.devices()[:4]
  make = lambda axes, *a: axes.make(devices)
  monkeypatch.setattr(topology, "make_mesh", make)
  c = model_config()
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = mesh
  c.teacher.dtype = "bfloat16"
  c.generate.update(cache_len=64, batch_size=8, samples=3, max_new_tokens=20)
  c.update_from_flattened_dict(changes)
  asked = config.PreflightOptions("v5e:2x2", verb="generate", dollars_per_chip_hour=2.0)
  c = dataclasses.replace(config.resolve(c), preflight=asked)
  return preflight.run(c), loading.open_source(c.teacher)


def table_bytes(c):
  """Bytes of the embedding table, of which a step reads almost nothing; 0 if it is the head."""
  return 0 if c.tie_word_embeddings else 2 * c.vocab_size * c.hidden_size


def test_bytes_and_bounds_by_hand(monkeypatch):
  r, source = estimated(monkeypatch)
  c = source.decoder_config
  row = 2 * c.cache_width * c.num_hidden_layers * 64 / 2  # per device: 2 bytes, half of the heads
  assert r["fits"] and r["gather"] == "once" and r["at"]["batch_size"] == 8
  assert r["bytes_per_device"]["cache"] == 4 * row  # 8 rows over fsdp=2
  assert r["bytes_per_device"]["prompt cache"] == 2 * row
  numbers = params.count(source.abstract)
  assert r["weights_gathered"] == pytest.approx(2 * numbers / 2, rel=0.05)  # norms are on all
  assert r["weights_stored"] == pytest.approx(2 * numbers / 4, rel=0.05)
  read = r["weights_gathered"] - table_bytes(c) / 2 + 4 * row
  assert r["at"]["bounds"]["hbm"] == pytest.approx(read / CHIP.hbm_bandwidth)
  assert r["at"]["tokens_per_second_bound"] == 8 / r["at"]["step_seconds_bound"]
  room = placement.ROOM * CHIP.hbm - r["weights_gathered"] - 2 * row
  assert r["largest"]["batch_size"] == 2 * math.floor(room / row)
  assert r["tokens"] == 1_000 * 3 * 20
  assert r["chip_hours"] == r["tokens"] / r["at"]["tokens_per_second_bound"] * 4 / 3600
  text = preflight.text(r)
  assert "each." in text and "$" in text and text.startswith("Fits: ")


def test_gathering_per_token_sends_the_weights(monkeypatch):
  once, _ = estimated(monkeypatch, **{"generate.gather": "once"})
  each, _ = estimated(monkeypatch, **{"generate.gather": "per_token"})
  assert each["bytes_per_device"]["weights"] == each["weights_stored"]
  sent = each["weights_gathered"] - each["weights_stored"]
  assert each["at"]["bounds"]["ici"] == pytest.approx(sent / CHIP.ici)
  assert once["at"]["bounds"]["ici"] < 0.2 * each["at"]["bounds"]["ici"]
  assert "gathered for every token" in preflight.text(each)


def test_a_step_reads_the_experts_of_its_rows(monkeypatch):
  changes = {"teacher.family": "deepseek_v3", "generate.batch_size": 2}
  r, source = estimated(monkeypatch, (1, 4, 1), **changes)
  c = source.config
  axes_of = lambda v: v.get_metadata()["axes"]
  weights = [v for _, v in params.named_params(source.abstract) if "experts" in axes_of(v)]
  size = sum(2.0 * math.prod(v.shape) for v in weights)
  n = weights[0].shape[axes_of(weights[0]).index("experts")]
  unread = size * (1 - c.num_experts_per_tok / n)  # a device has one row
  assert 0 < unread < r["weights_gathered"]
  read = r["weights_gathered"] - unread - table_bytes(c) + r["bytes_per_device"]["cache"]
  assert r["at"]["batch_size"] == 4  # rounded up to the devices
  assert r["at"]["bounds"]["hbm"] == pytest.approx(read / CHIP.hbm_bandwidth)


def test_what_does_not_fit_is_told(monkeypatch):
  monkeypatch.setattr(placement, "ROOM", 1e-6)
  r, _ = estimated(monkeypatch)
  text = preflight.text(r)
  assert not r["fits"] and r["largest"] is None and r["best"] is None
  assert text.startswith("Does not fit: ") and "Increase mesh.tensor." in text


def test_a_server_is_better_if_it_is_faster(monkeypatch):
  monkeypatch.setattr(decoding, "SERVER_RATE", 1e30)
  assert "A server is the better choice (generate.server): at" in preflight.text(
    estimated(monkeypatch)[0]
  )
  monkeypatch.setattr(decoding, "SERVER_RATE", 1e-30)
  assert "no worse than a server" in preflight.text(estimated(monkeypatch)[0])


def test_errors(monkeypatch):
  with pytest.raises(InputError, match="generate.gather is 'never'; expected one of"):
    estimated(monkeypatch, **{"generate.gather": "never"})


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: .[tpu] has it"
)


def on_v5p(name, *flags):
  command = [sys.executable, "-m", "distill_jax.cli", "preflight", "--topology=v5p:4x4x4"]
  command += [f"--config={CONFIGS / name}", "--verb=generate", "--json", *flags]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  return json.loads(run.stdout.splitlines()[-1])


@needs_libtpu
def test_a_7b_config_is_gathered_once():
  r = on_v5p("r1_sft_qwen_7b.py")
  assert r["fits"] and r["gather"] == "once" and r["at"]["batch_size"] == 128
  assert r["weights_gathered"] == pytest.approx(2 * 7.616e9, rel=0.01)
  row = 28 * 4 * 128 * 2 * 2 * 32_768  # layers, heads, their width, keys and values, 2 bytes
  assert r["bytes_per_device"]["cache"] == 2 * row
  seconds = (2 * 7.071e9 + 2 * row) / 2.765e12  # without the embedding table
  assert r["at"]["step_seconds_bound"] == pytest.approx(seconds, rel=0.01)


@needs_libtpu
@pytest.mark.slow
def test_r1_is_gathered_per_token_and_better_on_a_server():
  r = on_v5p("r1_record.py")
  assert r["gather"] == "per_token"
  assert r["mesh"] == {"data": 1, "fsdp": 16, "context": 1, "tensor": 4}
  assert r["weights_gathered"] == pytest.approx(2 * 671e9 / 4, rel=0.01)
  # 15/16 of the gathered weights come from other chips, 600 GB per second.
  assert r["at"]["step_seconds_bound"] == pytest.approx(336e9 * 15 / 16 / 600e9, rel=0.01)
  assert r["best"]["gather"] == "once" and r["best"]["mesh"]["tensor"] >= 16
  assert r["assumed_tokens_per_second"]["per chip, best mesh"] < 513


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("r1_sft_*.py")), ids=lambda path: path.stem)
def test_the_batches_of_the_r1_sft_configs_fit(path):
  assert on_v5p(path.name)["fits"]
