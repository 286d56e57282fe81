"""CLIP against transformers; and contrastive learning by the ordinary losses, on any mesh."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest

from distill_jax.errors import InputError
from distill_jax.hub import declared
from distill_jax.hub import export as hub_export
from distill_jax.losses import ce, embedding, kd
from distill_jax.models import clip
from distill_jax.nn import layers, params, sharding
from distill_jax.training.step import Step
from distill_jax.types import Batch, Images, ImageText, Inputs

torch, transformers = parity.torch, parity.transformers
B, S, PAD, EOS = 4, 9, 1, 255
TOWER = {"num_attention_heads": 4, "intermediate_size": 40}
CAPTURE = optax.GradientTransformationExtraArgs(  # the optimizer's state is the gradient
  lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, *_, **__: (g, g)
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """(the model in transformers, its folder, our model)."""
  torch.manual_seed(0)
  ids = {"bos_token_id": 254, "eos_token_id": EOS, "pad_token_id": PAD}
  text = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 256, **ids}
  vision = {"hidden_size": 48, "num_hidden_layers": 3, "image_size": 12, "patch_size": 4}
  config = transformers.CLIPConfig(
    text_config={**TOWER, **text, "max_position_embeddings": 16},
    vision_config={**TOWER, **vision, "num_channels": 2},
    projection_dim=24,
  )
  theirs = transformers.CLIPModel(config).float().eval()
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      p.copy_(int("norm" in name and "weight" in name) + 0.2 * torch.randn_like(p))
  folder = tmp_path_factory.mktemp("clip")
  return theirs, folder, parity.ours_from(theirs, folder)


def batch(rows: int = B, seed: int = 0) -> Batch:
  """Returns texts of different lengths, each with an end token, then padding."""
  rng = np.random.default_rng(seed)
  pixels = rng.normal(size=(rows, 12, 12, 2)).astype(np.float32)
  tokens = rng.integers(2, 250, (rows, S)).astype(np.int32)
  segments = (np.arange(S)[None] < rng.integers(3, S + 1, (rows, 1))).astype(np.int32)
  ends = segments.sum(1) - 1
  tokens[segments == 0] = PAD
  tokens[np.arange(rows), ends] = EOS
  positions = np.broadcast_to(np.arange(S, dtype=np.int32), (rows, S))
  texts = Inputs(*map(jnp.asarray, (tokens, positions, segments)))
  labels = jnp.zeros((rows, 2), jnp.int32)  # the step computes the labels in the batch
  inputs = ImageText(Images(jnp.asarray(pixels)), texts)
  return Batch(inputs, labels, jnp.ones((rows, 2), bool))


@jax.jit
def run(model, inputs: ImageText):
  return model(inputs, layers.ComputeConfig())


def another(model):
  """A model of the same shape with other weights."""
  rng = np.random.default_rng(1)
  noise = lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), jnp.float32)
  return jax.tree.map(noise, model)


def torch_inputs(b: Batch) -> dict:
  of = lambda x: torch.from_numpy(np.array(x))
  texts = b.inputs.texts
  return {
    "pixel_values": of(b.inputs.images.pixels_BYWM.transpose(0, 3, 1, 2)),
    "input_ids": of(texts.tokens_BT).long(),
    "attention_mask": of(texts.segments_BT).long(),
  }


@functools.cache
def program(names: tuple[str, ...]):
  losses = {"ce": ce.Loss(), "kd": kd.Loss(), "embedding": embedding.Loss()}
  step = Step(
    losses={n: losses[n] for n in names},
    learning_rate=lambda _: jnp.zeros(()),
    optimizer=CAPTURE,
    student=layers.ComputeConfig(),
    teacher=layers.ComputeConfig(),
    chunk=8,
    student_config=clip.TINY,
    teacher_configs={"teacher": clip.TINY},
  )
  return step, jax.jit(step)


def gradient(names, model, b: Batch, teachers=None):
  """Returns (metrics, gradient as a model) of a training step."""
  step, compiled = program(names)
  state, metrics = compiled(step.init(model), b, teachers or {})
  return {k: float(v) for k, v in metrics.items()}, state.opt[0]


def test_embeddings_logits_and_gradients_match_transformers(both):
  theirs, _, ours = both
  b = batch()
  want = theirs(**torch_inputs(b), return_loss=True)
  out = run(ours, b.inputs)
  image_BD, text_BD = out.embedding_BTD[:, 0], out.embedding_BTD[:, 1]
  assert parity.error(image_BD, want.image_embeds.detach()) < parity.FORWARD
  assert parity.error(text_BD, want.text_embeds.detach()) < parity.FORWARD
  per_image = out.hidden_BTD[:, 0] @ out.head_VD[:B].T
  per_text = out.hidden_BTD[:, 1] @ out.head_VD[B:].T
  assert parity.error(per_image, want.logits_per_image.detach()) < parity.FORWARD
  assert parity.error(per_text, want.logits_per_text.detach()) < parity.FORWARD

  metrics, grads = gradient(("ce",), ours, b)
  np.testing.assert_allclose(metrics["ce"], want.loss.item(), rtol=1e-5)
  want.loss.backward()
  got = {}
  for _, v in params.named_params(grads):
    for name, at in declared.tensors(v):
      got[name] = declared.Layout(v).to_stored(np.asarray(v[...])[at], np.dtype(np.float32))
  wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
  assert got.keys() == wanted.keys()
  largest = max(np.abs(w).max() for w in wanted.values())
  for name, w in wanted.items():
    # A bias of all keys does not change the softmax: its gradient is 0 up to rounding.
    scale = largest if name.endswith("k_proj.bias") else np.abs(w).max()
    assert np.abs(got[name].reshape(w.shape) - w).max() < parity.GRADIENT * scale, name


def test_an_export_is_read_by_transformers_bit_for_bit(both, tmp_path):
  theirs, folder, ours = both
  out = tmp_path / "out"
  hub_export.export_model(ours, out, tokenizer=None, generation={}, card="", dtype="float32")
  again, loaded = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
  assert not any(loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  for name, p in theirs.state_dict().items():
    assert torch.equal(again.state_dict()[name], p), name
  with torch.no_grad():
    same = torch_inputs(batch())
    assert torch.equal(again(**same).logits_per_image, theirs(**same).logits_per_image)
  of = lambda path: clip.Config.from_hf(json.loads((path / "config.json").read_text()))
  assert of(out) == of(folder) == ours.config


@pytest.mark.slow
def test_the_gradient_is_the_same_on_a_mesh(both):
  """Uses InfoNCE, affinity mimicking and embedding losses with all negatives of the batch."""
  student, teacher = both[2], another(both[2])
  names, b = ("ce", "kd", "embedding"), batch()
  want_metrics, want = gradient(names, student, b, {"teacher": teacher})
  mesh = sharding.make_mesh(1, 2, 2)
  with jax.set_mesh(mesh):
    place = lambda m: jax.device_put(m, sharding.shardings(m, mesh, layers.ComputeConfig().rules))
    there = jax.device_put(b, sharding.batch_sharding(mesh))
    metrics, got = gradient(names, place(student), there, {"teacher": place(teacher)})
  for name in ("loss", "ce", "kl/teacher", "embedding"):
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-5)
  largest = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(want))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, atol=2e-5 * max(np.abs(w).max(), 0.01 * largest))


def test_teacher_and_student_have_the_same_rows(both):
  """The KL is 0 for a teacher equal to the student, and matches float64 for another one."""
  b, model = batch(), both[2]
  metrics, _ = gradient(("ce", "kd", "embedding"), model, b, {"teacher": model})
  assert abs(metrics["kl/teacher"]) < 1e-5
  assert metrics["agreement/teacher"] == 1
  assert metrics["embedding"] < 1e-9
  # In float64, from transformers' own logits: the mean over both directions and all pairs.
  other = another(model)
  got, _ = gradient(("ce", "kd", "embedding"), model, b, {"teacher": other})
  both_out = [run(m, b.inputs) for m in (model, other)]
  expected = []
  for at, rows in ((0, slice(0, B)), (1, slice(B, 2 * B))):
    z, t = (np.asarray(o.hidden_BTD[:, at] @ o.head_VD[rows].T, np.float64) for o in both_out)
    log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    q, p = log_softmax(z), log_softmax(t)
    expected.append((np.exp(p) * (p - q)).sum(-1).mean())
  np.testing.assert_allclose(got["kl/teacher"], np.mean(expected), rtol=2e-5)


def test_a_padding_row_is_not_a_negative(both):
  """The padding row has probability 0, and other rows are unchanged."""
  b, model = batch().inputs, both[2]
  more = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:2])]), b)
  want, got = jax.device_get([run(model, inputs) for inputs in (b, more)])
  z_B2V = np.einsum("BTD,VD->BTV", got.hidden_BTD[:B], got.head_VD)
  plain_B2V = np.einsum("BTD,VD->BTV", want.hidden_BTD, want.head_VD)
  real_V = np.arange(2 * B + 4) % (B + 2) < B
  assert parity.error(z_B2V[..., real_V], plain_B2V) < parity.FORWARD
  assert np.all(np.exp(z_B2V[..., ~real_V] - z_B2V[..., :1]) == 0)


@pytest.mark.parametrize(
  "shape, size",  # of the Hub's safetensors, without the buffers of positions
  [("vit-b-32", 151_277_313), ("vit-b-16", 149_620_737), ("vit-l-14", 427_616_513)],
)
def test_a_shape_has_its_published_size(shape, size):
  config = clip.CONFIGS[shape]
  model = jax.eval_shape(lambda key: clip.Model(config, key), jax.random.key(0))
  assert params.count(model) == size
  assert clip.Config.from_hf(config.to_hf()) == config


def test_layers_of_both_towers_are_kept_together():
  with pytest.raises(
    InputError, match="keep_layers is .*the towers have different numbers of layers"
  ):
    clip.TINY.keep_layers((0,))
  text = dataclasses.replace(clip.TINY.text, num_hidden_layers=3)
  same = dataclasses.replace(clip.TINY, text=text)
  kept = same.keep_layers((0, 2))
  assert (kept.text.num_hidden_layers, kept.vision.num_hidden_layers) == (2, 2)
