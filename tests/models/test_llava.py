"""LLaVA against transformers: logits, gradients, and an export that it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from safetensors.numpy import load_file, save_file

from distill_jax.errors import InputError
from distill_jax.hub import declared, load
from distill_jax.hub import export as hub_export
from distill_jax.hub.pretrained import open_model
from distill_jax.models import llava
from distill_jax.nn import layers, params, sharding
from distill_jax.types import Images, ImageText

torch, transformers = parity.torch, parity.transformers
IMAGE, PATCHES, B, T = 60, 9, 2, 16


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """(the model in transformers, our model, inputs)."""
  torch.manual_seed(0)
  shape = {"intermediate_size": 40, "num_attention_heads": 4}
  vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 3, **shape}
  text = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    **shape,
  }
  config = transformers.LlavaConfig(
    vision_config={**vision, "image_size": 12, "patch_size": 4},
    text_config=text,
    image_token_index=IMAGE,
  )
  theirs = transformers.LlavaForConditionalGeneration(config).float().eval()
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      p.copy_(int("norm" in name and "weight" in name) + 0.2 * torch.randn_like(p))
  folder = published(tmp_path_factory.mktemp("llava"), theirs)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  ours = load.load_model(open_model(str(folder)), mesh, layers.ComputeConfig())
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, IMAGE, (B, T)).astype(np.int32)
  tokens[0, 2 : 2 + PATCHES] = tokens[1, 5 : 5 + PATCHES] = IMAGE
  pixels = rng.normal(size=(B, 12, 12, 3)).astype(np.float32)
  return theirs, ours, (tokens, pixels)


def published(folder, model):
  """Writes a folder with the tensor names of older transformers and of the Hub."""
  model.save_pretrained(folder)
  file = folder / "model.safetensors"
  old = "vision_tower."
  named = {n.replace(old, f"{old}vision_model."): x for n, x in load_file(file).items()}
  save_file(named, file)
  return folder


def outputs(both):
  theirs, _, (tokens, pixels) = both
  ids = torch.from_numpy(tokens).long()
  labels = torch.where(ids == IMAGE, -100, ids)  # the loss covers only text
  pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
  return theirs(input_ids=ids, pixel_values=pixels, labels=labels)


def inputs(both) -> ImageText:
  tokens, pixels = both[2]
  return ImageText(Images(jnp.asarray(pixels)), parity.plain_inputs(tokens))


def test_logits_and_gradients_match_transformers(both):
  theirs, ours, (tokens, _) = both
  want, read = outputs(both), inputs(both)
  want.loss.backward()

  def loss(model):
    out = model(read, layers.ComputeConfig())
    z_BTV = out.hidden_BTD @ out.head_VD.T
    logp_BTV = jax.nn.log_softmax(z_BTV[:, :-1])
    label_BT = tokens[:, 1:]
    ce_BT = -jnp.take_along_axis(logp_BTV, label_BT[..., None], -1)[..., 0]
    mask_BT = label_BT != IMAGE
    return jnp.sum(ce_BT * mask_BT) / mask_BT.sum(), z_BTV

  (ce, z_BTV), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours)
  assert parity.error(z_BTV, want.logits.detach()) < parity.FORWARD
  np.testing.assert_allclose(ce, want.loss.item(), rtol=1e-5)
  got = {}
  for _, v in params.named_params(grads):
    for name, at in declared.tensors(v):
      got[name] = declared.Layout(v).to_stored(np.asarray(v[...])[at], np.dtype(np.float32))
  wanted = {
    saved_name(name): np.zeros(p.shape) if p.grad is None else p.grad.numpy()
    for name, p in theirs.named_parameters()
  }
  assert got.keys() == wanted.keys()
  largest = max(np.abs(w).max() for w in wanted.values())
  for name, w in wanted.items():
    # Layers after `feature_layer`, and biases of keys, have a gradient of 0.
    scale = largest if "k_proj.bias" in name or not w.any() else np.abs(w).max()
    assert np.abs(got[name] - w).max() < parity.GRADIENT * scale, name


def test_tensor_names_of_transformers_5_are_read(both, tmp_path):
  theirs, ours, _ = both
  theirs.save_pretrained(tmp_path)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  again = load.load_model(open_model(str(tmp_path)), mesh, layers.ComputeConfig())
  for (name, a), (_, b) in zip(params.named_params(again), params.named_params(ours), strict=True):
    np.testing.assert_array_equal(a[...], b[...], err_msg=name)


def saved_name(name: str) -> str:
  """Returns the published name of a parameter of the model in transformers."""
  name = name.removeprefix("model.")
  name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
  name = name.replace("language_model.", "language_model.model.", 1)
  return f"language_model.{name}" if name.startswith("lm_head") else name


def test_transformers_reads_an_export(both, tmp_path):
  theirs, ours, _ = both
  out = tmp_path / "out"
  hub_export.export_model(ours, out, tokenizer=None, generation={}, card="", dtype="float32")
  again, loaded = transformers.AutoModelForImageTextToText.from_pretrained(
    out, output_loading_info=True
  )
  assert not any(loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  with torch.no_grad():
    got = outputs((again.eval(), *both[1:])).logits
    assert torch.equal(got, outputs(both).logits)


def test_a_shape_has_its_published_size():
  config = llava.CONFIGS["llava-1.5-7b"]
  model = jax.eval_shape(lambda key: llava.Model(config, key), jax.random.key(0))
  assert params.count(model) == 7_063_427_072
  assert llava.Config.from_hf(config.to_hf()) == config


def test_text_config_has_the_defaults_of_transformers():
  """The text_config of llava-1.5-7b only has values that differ from LlamaConfig's defaults."""
  want = llava.CONFIGS["llava-1.5-7b"]
  text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32_064}
  hf = {**want.to_hf(), "text_config": {**text, "rms_norm_eps": 1e-5}}
  assert llava.Config.from_hf(hf) == want
  theirs = transformers.LlamaConfig()
  assert {k: getattr(theirs, k) for k in llava.TEXT_DEFAULTS} == llava.TEXT_DEFAULTS


def test_unsupported_configs_are_refused(both):
  hf = both[1].config.to_hf()
  assert llava.Config.from_hf(hf) == both[1].config
  for key, value, match in (
    ("vision_feature_layer", [1, 2], "one layer"),
    ("vision_feature_layer", 7, "is 7; expected a layer of the vision tower, from -4 to 3"),
    (
      "projector_hidden_act",
      "relu",
      "expected 'gelu', the only value that the llava family supports",
    ),
    ("image_token_index", 64, "image_token_index is 64; expected a token below 64"),
  ):
    with pytest.raises(InputError, match=match):
      llava.Config.from_hf({**hf, key: value})
