"""Every family in and out: bit for bit, onto a mesh, and into transformers with equal logits."""

import json
import pathlib

import jax
import numpy as np
import parity
import pytest
from safetensors import safe_open

from distill_jax.hub import export as hub_export
from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding

transformers = parity.transformers


@pytest.fixture(scope="module", params=parity.DECODERS)
def both(request, tmp_path_factory):
  """(the model in transformers, its folder, our model)."""
  model_type, changes = parity.DECODERS[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  theirs = parity.torch_model(model_type, vocab_size=96, **changes)
  return theirs, folder, parity.ours_from(theirs, folder)


@pytest.fixture(scope="module")
def exported(both):
  _, folder, ours = both
  target = folder / "exported"
  hub_export.export_model(ours, target, tokenizer=None, generation={}, card="", dtype="float32")
  return target


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
  out = {}
  for f in folder.glob("*.safetensors"):
    with safe_open(f, "numpy") as s:
      out |= {name: s.get_tensor(name) for name in s.keys()}  # noqa: SIM118
  return out


def test_the_tensors_come_back_bit_for_bit(both, exported):
  got, want = stored(exported), stored(both[1])
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_transformers_computes_the_same_logits(both, exported):
  tokens = parity.torch.from_numpy(parity.tokens() % 96).long()
  again, loaded = transformers.AutoModelForCausalLM.from_pretrained(
    exported, attn_implementation="eager", output_loading_info=True
  )
  assert not any(loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert type(again) is type(both[0])
  with parity.torch.no_grad():
    # The same weights through the same code: to the last bit.
    assert parity.torch.equal(again(tokens).logits, both[0](tokens).logits)


def test_config_json_keeps_the_values_of_the_original(both, exported):
  of = lambda path: open_model(str(path)).config
  assert of(exported) == of(both[1])
  kind = json.loads((both[1] / "config.json").read_text())["architectures"]
  assert json.loads((exported / "config.json").read_text())["architectures"] == kind


def test_weights_and_outputs_are_the_same_on_a_mesh(both):
  _, folder, ours = both
  mesh = sharding.make_mesh(1, 2, 2)
  compute = layers.ComputeConfig()
  there = load.load_model(open_model(str(folder)), mesh, compute)
  for (name, a), (_, b) in zip(params.named_params(there), params.named_params(ours), strict=True):
    np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]), err_msg=name)
  wide = [a for _, a in params.named_params(there) if a.ndim > 2]
  assert not any(a[...].sharding.is_fully_replicated for a in wide)
  inputs = parity.plain_inputs(parity.tokens()[:, :16] % 96)
  hidden = jax.jit(lambda m, i: m(i, compute).hidden_BTD)
  want = hidden(ours, inputs)
  with jax.set_mesh(mesh):
    got = hidden(there, jax.device_put(inputs, sharding.batch_sharding(mesh)))
  assert parity.error(got, want) < parity.FORWARD


def test_a_student_with_selected_layers(both):
  _, folder, ours = both
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  student = load.load_model(
    open_model(str(folder)), mesh, layers.ComputeConfig(), keep_layers=(0, 2)
  )
  assert student.config == ours.config.keep_layers((0, 2))
  inputs = parity.plain_inputs(parity.tokens()[:, :16] % 96)
  taps_of = lambda at: jax.jit(lambda m, i: m(i, layers.ComputeConfig(), at).taps_PBTD)
  taps, got = taps_of((0,))(ours, inputs), taps_of((0, 1))(student, inputs)
  assert parity.error(got[0], taps[0]) < parity.FORWARD  # layers 0 and 2 are kept
  assert student.config.num_hidden_layers == 2 and len(got) == 2
