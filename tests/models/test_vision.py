"""Families that read images against transformers: logits, features, gradients, in and out."""

import copy
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from safetensors import safe_open

from distill_jax.errors import InputError
from distill_jax.hub import declared, load
from distill_jax.hub import export as hub_export
from distill_jax.hub.pretrained import open_model
from distill_jax.models import convnext, deit, vit
from distill_jax.nn import layers, params, sharding
from distill_jax.types import Images

torch, transformers = parity.torch, parity.transformers
ENCODER = {
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "image_size": 12,
  "patch_size": 4,
  "num_channels": 2,
  "num_labels": 5,
}
KINDS = {
  "vit": ("ViTForImageClassification", ENCODER | {"hidden_act": "gelu_new"}),
  "deit": ("DeiTForImageClassificationWithTeacher", ENCODER),
  "convnext": (
    "ConvNextForImageClassification",
    # 13 / 2 and 6 / 2 / 2 skip a row.
    {
      "hidden_sizes": [6, 10, 12],
      "depths": [1, 2, 1],
      "num_stages": 3,
      "patch_size": 2,
      "num_channels": 2,
      "num_labels": 5,
      "image_size": 13,
    },
  ),
}
PUBLISHED = {  # of the models' safetensors on the Hub
  (vit, "vit-base-16"): 86_567_656,
  (deit, "deit-tiny-16"): 5_910_800,
  (deit, "deit-base-16"): 87_338_192,
  (convnext, "convnext-tiny"): 28_589_128,
}
HOW = layers.ComputeConfig()
# Tolerances relative to the largest value: three times the observed 6e-7 and 7e-6 of float32.
FORWARD, GRADIENT = 2e-6, 2e-5


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
  """(the model in transformers, its folder, our model, pixels)."""
  kind, (name, changes) = request.param, KINDS[request.param]
  torch.manual_seed(0)
  theirs = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **changes))
  theirs = theirs.float().eval()
  with torch.no_grad():
    for n, p in theirs.named_parameters():  # so that norms are not 1 and biases not 0
      p.copy_(int("norm" in n and n.endswith("weight")) + 0.2 * torch.randn_like(p))
  path = tmp_path_factory.mktemp(kind)
  ours = parity.ours_from(theirs, path)
  W = changes["image_size"]
  pixels = np.random.default_rng(1).standard_normal((3, W, W, 2)).astype(np.float32)
  return theirs, path, ours, pixels


def torch_pixels(pixels_BYWM):
  return torch.from_numpy(np.ascontiguousarray(pixels_BYWM.transpose(0, 3, 1, 2)))


@functools.partial(jax.jit, static_argnames="compute")
def logits(model, pixels, compute=HOW):
  out = model(Images(jnp.asarray(pixels)), compute)
  return jnp.einsum("BTD,VD->BTV", out.hidden_BTD, out.head_VD)


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
  with safe_open(folder / "model.safetensors", "numpy") as s:
    return {name: s.get_tensor(name) for name in s.keys()}  # noqa: SIM118


def torch_gradients(theirs, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns tensors under the names that transformers writes, which differ from those in memory."""
  holder = copy.deepcopy(theirs)
  with torch.no_grad():
    for to, p in zip(holder.parameters(), theirs.parameters(), strict=True):
      to.copy_(p.grad)
  holder.save_pretrained(folder)
  return stored(folder)


def test_logits_and_gradients_are_those_of_transformers(both, tmp_path):
  theirs, _, ours, pixels = both
  labels = np.array([4, 0, 2])
  want = theirs(torch_pixels(pixels)).logits
  torch.nn.functional.cross_entropy(want, torch.from_numpy(labels)).backward()

  def loss(model):
    z_BV = logits(model, pixels)[:, 0]
    return -jnp.mean(jax.nn.log_softmax(z_BV)[jnp.arange(3), labels]), z_BV

  grads, got = jax.jit(jax.grad(loss, has_aux=True))(ours)
  assert parity.error(got, want.detach()) < FORWARD
  want_grads = torch_gradients(theirs, tmp_path)
  largest = max(np.abs(x).max() for x in want_grads.values())
  for _, v in params.named_params(grads):
    for name, i in declared.tensors(v):
      x = declared.Layout(v).to_stored(np.asarray(v[...])[i], np.dtype(np.float32))
      y = want_grads.pop(name)
      # A key's bias does not change the softmax: its gradient is 0 up to rounding in both.
      assert np.abs(x - y).max() < GRADIENT * max(np.abs(y).max(), 1e-2 * largest), name
  assert not want_grads


def test_weights_round_trip_and_transformers_computes_the_same(both, tmp_path):
  theirs, path, ours, pixels = both
  target = tmp_path / "exported"
  hub_export.export_model(ours, target, tokenizer=None, generation={}, card="", dtype="float32")
  got, want = stored(target), stored(path)
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)
  of = lambda folder: open_model(str(folder)).config
  assert of(target) == of(path)
  again, loaded = transformers.AutoModelForImageClassification.from_pretrained(
    target, output_loading_info=True
  )
  assert type(again) is type(theirs)
  assert not any(loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  with torch.no_grad():
    # The same weights through the same code: to the last bit.
    assert torch.equal(again(torch_pixels(pixels)).logits, theirs(torch_pixels(pixels)).logits)


def test_deit_has_two_outputs_in_training(both):
  theirs, _, ours, pixels = both
  if not isinstance(ours, deit.Model):
    return
  with torch.no_grad():
    out = theirs(torch_pixels(pixels))
  want = torch.stack([out.cls_logits, out.distillation_logits], 1)
  got = logits(ours, pixels, layers.ComputeConfig(training=True))
  assert parity.error(got, want) < FORWARD


def test_taps_are_the_layers_outputs(both):
  theirs, _, ours, pixels = both
  inputs = Images(jnp.asarray(pixels))
  if isinstance(ours, convnext.Model):
    with pytest.raises(InputError, match="several widths"):
      ours(inputs, HOW, (0,))
    return
  with torch.no_grad():
    want = theirs(torch_pixels(pixels), output_hidden_states=True).hidden_states
  got = jax.jit(lambda m, i: m(i, HOW, (1, 0)).taps_PBTD)(ours, inputs)
  # The last hidden state of transformers is the last layer's output.
  assert parity.error(got, torch.stack([want[2], want[1]])) < FORWARD


def test_a_mesh_computes_the_same(both):
  _, path, ours, pixels = both
  if isinstance(ours, convnext.Model):
    mesh = sharding.make_mesh(2, 2, 1)
  else:
    mesh = sharding.make_mesh(1, 4, 1)  # 3 heads and 5 classes are not sharded
  there = load.load_model(open_model(str(path)), mesh, HOW)
  pixels = np.concatenate([pixels, pixels[:1]])
  with jax.set_mesh(mesh):
    inputs = jax.device_put(pixels, sharding.batch_sharding(mesh))
    got = logits(there, inputs)
  assert parity.error(got, logits(ours, pixels)) < FORWARD


def test_both_depthwise_implementations_agree(monkeypatch):
  rng = np.random.default_rng(0)
  x, w = np.float32(rng.normal(size=(2, 9, 5, 3))), np.float32(rng.normal(size=(3, 1, 7, 7)))
  total = lambda *a: jnp.sum(convnext.depthwise(*a) ** 2)
  grad = lambda: jax.jit(jax.value_and_grad(lambda *a: total(*a), (0, 1)))(x, w)  # traced anew
  few = grad()
  monkeypatch.setattr(convnext, "MATMUL_PLACES", 0)
  many = grad()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), few, many)


@pytest.mark.parametrize("module", [vit, deit, convnext], ids=lambda m: m.__name__[19:])
def test_configs_round_trip_through_config_json(module):
  for config in module.CONFIGS.values():
    assert module.Config.from_hf(config.to_hf()) == config


def test_a_shape_has_its_published_size():
  named = {(m, n) for m in (vit, deit, convnext) for n in m.CONFIGS if n != "tiny"}
  assert named == PUBLISHED.keys()
  for (module, name), want in PUBLISHED.items():
    make = lambda key, m=module, c=module.CONFIGS[name]: m.Model(c, key)
    assert params.count(jax.eval_shape(make, jax.random.key(0))) == want


@pytest.mark.parametrize(
  "module, changes, message",
  [
    (vit, {"patch_size": 5}, "patch_size is 5; expected a divisor of image_size, 12"),
    (vit, {"hidden_act": "swash"}, "swash"),
    (deit, {"num_channels": 0}, "num_channels is 0"),
    (convnext, {"depths": (1,)}, "depths is .1,.; expected 2 numbers"),
    (convnext, {"hidden_sizes": (8, -1)}, "hidden_sizes is .8, -1.; expected positive"),
    (convnext, {"layer_scale_init_value": 0.0}, "layer_scale_init_value"),
  ],
)
def test_an_invalid_shape_is_refused(module, changes, message):
  with pytest.raises(InputError, match=message):
    dataclasses.replace(module.TINY, **changes)


def test_unsupported_inputs_are_refused():
  with pytest.raises(InputError, match="qkv_bias"):
    vit.Config.from_hf({**vit.TINY.to_hf(), "qkv_bias": False})
  with pytest.raises(InputError, match="several widths"):
    convnext.TINY.keep_layers((0,))
  model = jax.eval_shape(lambda key: vit.Model(vit.TINY, key), jax.random.key(0))
  wrong = Images(jax.ShapeDtypeStruct((2, 12, 16, 1), jnp.float32))
  with pytest.raises(InputError, match=r"\(12, 16, 1\)"):
    jax.eval_shape(lambda m, i: m(i, HOW), model, wrong)
