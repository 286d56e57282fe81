"""ViT checkpoints of timm: the model agrees with transformers on the same weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from safetensors.numpy import save_file

from distill_jax.errors import InputError
from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding
from distill_jax.types import Images

torch, transformers = parity.torch, parity.transformers
D, LAYERS = 128, 2  # timm's heads are 64 wide


def timm_tensors(hf):
  """Returns a checkpoint written by hand, after timm's vision_transformer.py."""
  get = lambda name: hf[name].detach().numpy()
  both = lambda to, name: {f"{to}.{end}": get(f"{name}.{end}") for end in ("weight", "bias")}
  made = {"cls_token": get("vit.embeddings.cls_token")}
  made["pos_embed"] = get("vit.embeddings.position_embeddings")
  made |= both("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")
  made |= both("norm", "vit.layernorm") | both("head", "classifier")
  for i in range(LAYERS):
    to, at = f"blocks.{i}.", f"vit.layers.{i}."
    for end in ("weight", "bias"):
      parts = [get(f"{at}attention.{n}_proj.{end}") for n in "qkv"]
      made[f"{to}attn.qkv.{end}"] = np.concatenate(parts)
    made |= both(f"{to}attn.proj", f"{at}attention.o_proj")
    made |= both(f"{to}mlp.fc1", f"{at}mlp.fc1") | both(f"{to}mlp.fc2", f"{at}mlp.fc2")
    made |= both(f"{to}norm1", f"{at}layernorm_before") | both(f"{to}norm2", f"{at}layernorm_after")
  return made


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """Returns (the model of transformers, a folder in the format of timm)."""
  torch.manual_seed(0)
  config = transformers.ViTConfig(
    hidden_size=D,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=D // 64,
    image_size=8,
    patch_size=4,
    num_channels=3,
    num_labels=7,
    layer_norm_eps=1e-6,
  )
  theirs = transformers.ViTForImageClassification(config).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(0.1 * torch.randn_like(p))
  folder = tmp_path_factory.mktemp("timm")
  save_file(timm_tensors(dict(theirs.named_parameters())), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch4_8"}))
  return theirs, folder


def test_logits_are_those_of_transformers_on_one_device_and_four(case):
  theirs, folder = case
  pretrained = open_model(str(folder))
  pixels = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
  ours = load.load_model(
    pretrained, sharding.make_mesh(devices=jax.devices()[:1]), layers.ComputeConfig()
  )
  out = ours(Images(jnp.asarray(pixels)), layers.ComputeConfig())
  with torch.no_grad():
    want = theirs(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))).logits
  # Relative to the maximum, for float32 and two layers; measured: 4e-7.
  assert parity.error((out.hidden_BTD @ out.head_VD.T)[:, 0], want) < 2e-6
  # Slices of the thirds, with heads and embeddings sharded over two devices each.
  spread = load.load_model(
    pretrained, sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4]), layers.ComputeConfig()
  )
  for (name, a), (_, b) in zip(params.named_params(spread), params.named_params(ours), strict=True):
    np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]), err_msg=name)


def test_another_model_of_timms_is_refused_by_name(case, tmp_path):
  theirs, folder = case
  made = timm_tensors(dict(theirs.named_parameters()))
  save_file({**made, "fc_norm.weight": np.ones(D, np.float32)}, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with pytest.raises(InputError, match="fc_norm.weight"):
    load.load_model(open_model(str(tmp_path)), mesh, layers.ComputeConfig())
  del made["pos_embed"]
  save_file(made, tmp_path / "model.safetensors")
  with pytest.raises(InputError, match="pos_embed"):
    open_model(str(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
  with pytest.raises(InputError, match="model_type None"):
    open_model(str(tmp_path))
