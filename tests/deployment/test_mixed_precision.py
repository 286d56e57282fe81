"""Rounded models beside gguf's arithmetic, their loss beside float64, the choice of widths."""

import dataclasses
import functools
import itertools
import math

import gguf
import jax
import numpy as np
import pytest
import rounded_choice

from distill_jax.deployment import mixed_precision, rounding
from distill_jax.deployment.calibration import Calibration
from distill_jax.deployment.mixed_precision import Stored
from distill_jax.deployment.rounding import Width
from distill_jax.errors import InputError
from distill_jax.hub import declared, gguf_export
from distill_jax.hub.gguf_tensors import Numbers
from distill_jax.models import deepseek_v3, llama, qwen3
from distill_jax.nn import params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import collate

MOE = dataclasses.replace(qwen3.CONFIGS["tiny-moe"], moe_intermediate_size=32, num_hidden_layers=2)
KINDS = {"llama": (llama, llama.TINY), "experts": (qwen3, MOE)}
COMPUTE = ComputeConfig()


@functools.cache
def init(name):
  module, c = KINDS[name]
  return jax.jit(lambda key: module.Model(c, key))


def random_model(name="llama"):
  """A model that no other test donates."""
  return init(name)(jax.random.key(0))


def torch_tensors(model):
  """The tensors of a model by their Hugging Face names, [outputs, inputs]."""
  out = {}
  for _, v in params.named_params(model):
    layout = declared.Layout(v)
    for name, at in declared.tensors(v):
      out[name] = layout.to_stored(np.asarray(v[...])[at], np.dtype("float32"))
  return out


@functools.cache
def text():
  rng = np.random.default_rng(0)
  rows = [
    {
      "tokens_T": rng.integers(0, 256, 24).astype(np.int32),
      "segments_T": np.ones(24, np.int32),
      "mask_T": rng.random(24) < 0.8,
    }
    for _ in range(3)
  ]
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  held = sharding.rows(mesh, 2)  # the last batch is padded
  return mesh, [collate.to_device(b, held) for b in collate.padded_batches(rows, held)]


def calibrated(model):
  mesh, batches = text()
  return Calibration(model, batches, COMPUTE, mesh, chunk=10, vocab_size=256)


@pytest.mark.parametrize("name", KINDS)
def test_a_rounded_model_has_the_numbers_of_ggufs_own_arithmetic(name):
  model = random_model(name)
  numbers = itertools.cycle(("Q4_0", "Q8_0", "F16"))
  widths = {t: Width(n) for t, n in zip(rounding.layer_tensors(model), numbers, strict=False)}
  want = rounded_by_gguf(model, widths)
  got = torch_tensors(rounding.round_model(model, widths, Width("Q8_0")))
  for tensor, x in want.items():
    np.testing.assert_array_equal(got[tensor], x, err_msg=tensor)


def rounded_by_gguf(model, widths):
  """The tensors of a model as [outputs, inputs], each linear weight and table rounded."""
  want = {}
  for path, v in params.named_params(model):
    for name, at in declared.tensors(v):
      x, width = torch_tensors(model)[name], widths.get((path, at[0] if at else 0))
      if name == "model.embed_tokens.weight":
        width = Width("Q8_0")
      if width is not None:
        kind = gguf.GGMLQuantizationType[width.numbers]
        x = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
      want[name] = x
  return want


def test_a_tensor_is_put_back_bit_for_bit():
  model = random_model("experts")
  want = torch_tensors(model)
  for tensor in rounding.layer_tensors(model)[1::5]:
    model, before = rounding.round_tensor(model, tensor, Width("Q4_0"))
    assert any(np.any(x != want[n]) for n, x in torch_tensors(model).items())
    model = rounding.put_back(model, tensor, before)
  for name, x in torch_tensors(model).items():
    np.testing.assert_array_equal(x, want[name])


def test_the_loss_is_that_of_dense_float64():
  model = random_model()
  calibration = calibrated(model)
  assert calibration.loss(model).kl < 1e-9
  exact, kl, ce, labels = log_probs(model), 0.0, 0.0, 0
  rounded = rounding.round_model(
    model, dict.fromkeys(rounding.layer_tensors(model), Width("Q4_0")), Width("Q8_0")
  )
  for batch, p, q in zip(text()[1], exact, log_probs(rounded), strict=True):
    mask, at = np.asarray(batch.mask_BT), np.asarray(batch.labels_BT)[..., None]
    kl += (np.exp(p) * (p - q)).sum(-1)[mask].sum()
    ce += np.take_along_axis(p - q, at, -1)[..., 0][mask].sum()
    labels += mask.sum()
  loss = calibration.loss(rounded)
  assert kl / labels > 1e-4
  # The logits are products in float32.
  np.testing.assert_allclose(loss, (kl / labels, ce / labels), rtol=1e-3, atol=1e-7)


def log_probs(model):
  out = []
  for batch in text()[1]:
    y = forward(model, batch.inputs)
    z = np.asarray(y.hidden_BTD, np.float64) @ np.asarray(y.head_VD, np.float64).T
    z -= z.max(-1, keepdims=True)
    out.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
  return out


forward = jax.jit(lambda model, inputs: model(inputs, COMPUTE))


def candidates(model):
  return mixed_precision.candidates(model, Numbers("Q4_0", "Q8_0"))


def test_measurements_survive_a_stop_and_do_not_change_the_model(tmp_path):
  file, model = tmp_path / "rounding.json", random_model()
  calibration = calibrated(model)
  tensors = {name: c.tensor for name, c in candidates(model).items()}
  with pytest.raises(KeyboardInterrupt):
    mixed_precision.measure(model, Counting(calibration, 16), tensors, file, "key")
  first = dict(itertools.islice(tensors.items(), 8))  # a layer has 7
  model, kls = mixed_precision.measure(
    random_model(), again := Counting(calibration), first, file, "key"
  )
  assert again.losses == 2 and kls.keys() == first.keys()
  assert calibration.loss(model).kl < 1e-9
  for name in ("blk.0.attn_q.weight", [*first][-1]):
    model, before = rounding.round_tensor(model, tensors[name], Width("Q8_0"))
    assert calibration.loss(model).kl == kls[name]["Q8_0"] < kls[name]["Q4_0"]
    model = rounding.put_back(model, tensors[name], before)
  few = dict(itertools.islice(tensors.items(), 1))
  mixed_precision.measure(model, again := Counting(calibration), few, file, "another model")
  assert again.losses == 2


class Counting:
  """Calibration that counts its measurements, and is interrupted after some of them."""

  def __init__(self, calibration, stop=100):
    self.losses, self._stop, self._calibration = 0, stop, calibration

  def loss(self, model):
    self.losses += 1
    if self.losses > self._stop:
      raise KeyboardInterrupt
    return self._calibration.loss(model)


@pytest.mark.slow
def test_mixed_widths_are_among_the_best_of_their_size(tmp_path):
  """All choices for five tensors that fit, each measured as a whole."""
  model = random_model()
  calibration = calibrated(model)
  few = dict([*candidates(model).items()][:5])
  tensors = {name: c.tensor for name, c in few.items()}
  model, kls = mixed_precision.measure(model, calibration, tensors, tmp_path / "m.json", "")
  options = mixed_precision.options(few, kls)
  smallest, largest = (sum(c.sizes[w] for c in few.values()) for w in ("Q4_0", "F16"))
  budget = smallest + (largest - smallest) // 3

  def measured(choice):
    nonlocal model
    model, kl = rounded_choice.measured(model, calibration, tensors, choice)
    return kl

  choice = mixed_precision.choose(options, budget)
  fit = [c for c in every_choice(options) if mixed_precision.total_bytes(options, c) <= budget]
  of_all = sorted(map(measured, fit))
  assert choice in fit and len(fit) > 50
  assert measured(choice) <= of_all[len(fit) // 20]
  assert measured(choice) < measured(dict.fromkeys(few, "Q4_0"))


def every_choice(options):
  return (dict(zip(options, c, strict=True)) for c in itertools.product(*options.values()))


def total_kl(options, choice):
  return sum(options[t][w].kl for t, w in choice.items())


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_within_one_widening_of_the_best(seed):
  rng = np.random.default_rng(seed)
  options = {}
  for i in range(6):
    n, worst = 32 * int(rng.integers(1, 9)), float(rng.exponential())
    kls = {"Q4_0": worst, "Q8_0": worst * rng.uniform(0, 0.1), "F16": 0.0}
    bytes_of = {"Q4_0": 18 * n, "Q8_0": 34 * n, "F16": 64 * n}
    options[str(i)] = {w: Stored(bytes_of[w], kls[w]) for w in kls}
  least = sum(o["Q4_0"].nbytes for o in options.values())
  for budget in np.linspace(least, 64 / 18 * least, 7):
    choice = mixed_precision.choose(options, int(budget))
    assert mixed_precision.total_bytes(options, choice) <= budget
    fit = [c for c in every_choice(options) if mixed_precision.total_bytes(options, c) <= budget]
    best = min(total_kl(options, c) for c in fit)
    saving = max(o["Q4_0"].kl for o in options.values())
    assert best <= total_kl(options, choice) <= best + saving
  assert set(choice.values()) == {"F16"}  # all fit


def test_the_choice_is_the_best_if_all_widenings_have_one_size():
  kls = np.random.default_rng(0).exponential(size=(6, 2))
  options = {
    str(i): {"Q4_0": Stored(18, a + b), "Q8_0": Stored(34, b)} for i, (a, b) in enumerate(kls)
  }
  for wide in range(7):
    choice = mixed_precision.choose(options, 6 * 18 + wide * 16 + 15)
    saved = sorted(kls[:, 0])[6 - wide :]
    assert math.isclose(total_kl(options, choice), kls.sum() - sum(saved))


def test_a_widening_that_does_not_help_is_not_made():
  options = {"a": {"Q4_0": Stored(18, 1.0), "Q8_0": Stored(34, 1.5)}}
  assert mixed_precision.choose(options, 100) == {"a": "Q4_0"}


def test_the_sizes_are_those_of_the_file():
  model = jax.eval_shape(init("experts"), jax.random.key(0))
  few = candidates(model)
  assert len(few) == 2 * 7
  for name, width in (("blk.1.ffn_down_exps.weight", "Q4_0"), ("blk.0.attn_q.weight", "Q8_0")):
    _, planned = gguf_export.plan(model, Numbers(width, "Q8_0"))
    (tensor,) = (t for t in planned if t.name == name)
    assert few[name].sizes[width] == tensor.nbytes
  assert few["blk.1.ffn_down_exps.weight"].tensor == ("layers.experts.down", 1)


def test_weights_that_stay_float32_in_the_file_are_no_candidates():
  """The width of DeepSeek's latents does not depend on that of the other tensors."""
  c = dataclasses.replace(
    deepseek_v3.TINY, q_lora_rank=32, kv_lora_rank=32, v_head_dim=8, moe_intermediate_size=32
  )
  model = jax.eval_shape(lambda: deepseek_v3.Model(c, jax.random.key(0)))
  few = candidates(model)
  paths = {c.tensor.path for c in few.values()}
  every = {t.path for t in rounding.layer_tensors(model)}
  assert every - paths == {"dense.kv_up", "layers.kv_up"}
  for width in ("Q4_0", "Q8_0", "F16"):
    numbers = Numbers("Q8_0", "Q8_0", dict.fromkeys(few, width))
    sizes = {t.name: t.nbytes for t in gguf_export.plan(model, numbers)[1]}
    assert {name: c.sizes[width] for name, c in few.items()} == {n: sizes[n] for n in few}
    assert sum(sizes.values()) - sum(sizes[n] for n in few) == rest(model)


def rest(model):
  _, planned = gguf_export.plan(model, Numbers("Q4_0", "Q8_0"))
  return sum(t.nbytes for t in planned if t.role != "linear")


def test_sizes_that_cannot_be_reached_or_need_no_rounding_are_refused():
  few = candidates(jax.eval_shape(init("llama"), jax.random.key(0)))
  smallest, largest = (1000 + sum(c.sizes[w] for c in few.values()) for w in ("Q4_0", "F16"))
  mixed_precision.check_target(few, 1000, smallest)
  mixed_precision.check_target(few, 1000, largest - 1)
  with pytest.raises(InputError, match=f"target_bytes is {smallest - 1}; expected at least"):
    mixed_precision.check_target(few, 1000, smallest - 1)
  with pytest.raises(InputError, match="set export.quant='F16'"):
    mixed_precision.check_target(few, 1000, largest)
