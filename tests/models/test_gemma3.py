"""Gemma 3 against transformers (torch, float32), and what its config.json may say."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.evals import next_token as lm
from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.losses import ce
from distill_jax.models import gemma3
from distill_jax.nn import fused_head, layers, sharding
from distill_jax.records import sampler
from distill_jax.training import outputs, step
from distill_jax.types import Batch

# Heads of width 12, scaled as if of width 20; every second layer is global, others see 5.
GEMMA = {
  "query_pre_attn_scalar": 20,
  "sliding_window": 5,
  "num_hidden_layers": 4,
  "layer_types": [gemma3.LOCAL, gemma3.GLOBAL] * 2,
  "pad_token_id": None,  # otherwise torch computes no gradient for that row
}
ROPES = {
  gemma3.GLOBAL: {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0},
  gemma3.LOCAL: {"rope_type": "default", "rope_theta": 300.0},
}
CASES = {
  "in turns": {},
  "one key/value head": {"num_key_value_heads": 1, "head_dim": 20, "rms_norm_eps": 1e-2},
  "two ropes, one scaled": {"rope_parameters": ROPES},
  "all local": {"layer_types": [gemma3.LOCAL] * 4},
  "capped logits": {"final_logit_softcapping": 3.0},
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_logits_match_transformers(case, tmp_path):
  theirs = parity.torch_model("gemma3_text", **GEMMA | CASES[case])
  errors = parity.forward_errors(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert max(errors) < parity.FORWARD, errors


@pytest.mark.parametrize("case", ["in turns", "capped logits"])
def test_gradients_match_transformers(case, tmp_path):
  theirs = parity.torch_model("gemma3_text", **GEMMA | CASES[case])
  worst = parity.worst_gradient(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert worst[0] < parity.GRADIENT, worst


@pytest.mark.parametrize("layer", [0, 1])
def test_local_and_global_layers_have_different_rope(layer, tmp_path):
  theirs = parity.torch_model("gemma3_text", **GEMMA | CASES["two ropes, one scaled"])
  ours, inputs = parity.ours_from(theirs, tmp_path), parity.plain_inputs(parity.tokens())
  x_BTD = np.random.default_rng(0).standard_normal((parity.B, parity.T, 48)).astype(np.float32)
  got = jax.jit(lambda m: m.qkv(layer, x_BTD, inputs, layers.ComputeConfig())[1])(ours)
  block, at = theirs.model.layers[layer], parity.torch.arange(parity.T)[None]
  with parity.torch.no_grad():
    x = block.input_layernorm(parity.torch.from_numpy(x_BTD))
    k = block.self_attn.k_norm(block.self_attn.k_proj(x).view(parity.B, parity.T, 2, 12))
    cos, sin = theirs.model.rotary_emb(x, at, GEMMA["layer_types"][layer])
    rotate = parity.transformers.models.gemma3.modeling_gemma3.apply_rotary_pos_emb
    want, _ = rotate(k, k, cos, sin, unsqueeze_dim=2)
  assert parity.error(got, want) < parity.FORWARD


@pytest.mark.parametrize(
  "change, word",
  [
    ({"layer_types": [gemma3.LOCAL] * 2}, "layer_types is .*; expected 3 entries"),
    ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": -30.0}, "final_logit_softcapping"),
    ({"hidden_activation": "gelu"}, "hidden_activation"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"rope_parameters": {gemma3.LOCAL: ROPES[gemma3.GLOBAL]}}, "for sliding_attention"),
    ({"sliding_window": None}, "sliding_window"),
  ],
)
def test_an_unsupported_config_is_refused(change, word):
  with pytest.raises(InputError, match=word):
    gemma3.Config.from_hf(gemma3.TINY.to_hf() | change)


def test_config_json_from_older_transformers():
  """Like that of gemma-3-4b: one rope scaling, a layer pattern, no key for tied embeddings."""
  want = gemma3.CONFIGS["gemma-3-4b"]
  hf = want.to_hf() | {"sliding_window_pattern": 6}
  for key in ("rope_parameters", "layer_types", "tie_word_embeddings", "attention_bias"):
    del hf[key]
  assert hf["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
  assert gemma3.Config.from_hf(hf) == want


def test_rope_scaling_changes_rope_parameters_as_in_transformers():
  hf = gemma3.TINY.to_hf() | {"rope_parameters": copy.deepcopy(ROPES)}
  del hf["rope_theta"]
  hf["rope_scaling"] = {"factor": 3.0}
  ours = gemma3.Config.from_hf(hf)
  theirs = parity.transformers.Gemma3TextConfig(**hf).rope_parameters[gemma3.GLOBAL]
  assert ours.rope_theta == theirs["rope_theta"] == 5e4
  assert ours.rope_scaling.factor == theirs["factor"] == 3.0


# As in the config.json of gemma-3-4b, the sizes that are those of Gemma3TextConfig are missing.
MISSING = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size")


@pytest.mark.parametrize("start", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_of_images_is_read(start, tmp_path):
  transformers, torch = parity.transformers, parity.torch
  torch.manual_seed(0)
  vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
  vision |= {"hidden_size": 16, "intermediate_size": 16}
  c = transformers.Gemma3Config(text_config=parity.BASE | GEMMA, vision_config=vision)
  theirs = transformers.Gemma3ForConditionalGeneration(c).float().eval()
  theirs.save_pretrained(tmp_path)
  file = tmp_path / "model.safetensors"
  ends = {n.partition("layers.0.")[0] for n in load_file(file) if "layers.0.input_" in n}
  named = {n.replace(*ends, start): x for n, x in load_file(file).items()}
  save_file(named, file, metadata={"format": "pt"})
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  ours = load.load_model(open_model(str(tmp_path)), mesh, layers.ComputeConfig())
  tokens_BT = parity.tokens()
  with torch.no_grad():
    want = theirs(torch.from_numpy(tokens_BT).long()).logits
  out = jax.jit(lambda m: m(parity.plain_inputs(tokens_BT), layers.ComputeConfig()))(ours)
  assert parity.error(out.hidden_BTD @ out.head_VD.T, want) < parity.FORWARD


def test_text_config_has_the_defaults_of_transformers():
  text = gemma3.CONFIGS["gemma-3-4b"].to_hf()
  for key in MISSING:
    del text[key]
  read = gemma3.Config.from_hf({"model_type": "gemma3", "text_config": text})
  assert read == gemma3.CONFIGS["gemma-3-4b"]
  theirs = parity.transformers.Gemma3TextConfig()
  assert {k: getattr(theirs, k) for k in gemma3.TEXT_DEFAULTS} == gemma3.TEXT_DEFAULTS


def test_a_token_of_images_without_a_row_is_ordinary_text(tmp_path):
  """Like gemma-3-1b: 262,144 rows, and a tokenizer with <image_soft_token> as id 262,144."""
  words = {f"w{i}": i for i in range(254)} | {"<unk>": 254, "<image_soft_token>x": 255}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
  tokenizer.add_special_tokens(["<image_soft_token>"])
  (tmp_path / "config.json").write_text(json.dumps(gemma3.TINY.to_hf()))
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  opened = open_model(str(tmp_path))
  ours = corpus.of_files(opened.tokenizer, "tiny")
  assert (tokenizer.get_vocab_size(), ours.vocab_size) == (257, 256)
  assert ours.encode("<image_soft_token>x") == [255]
  tokenizer.add_special_tokens(["<another>"])
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(InputError, match="has 258 tokens, but the model's embedding has 256 rows"):
    open_model(str(tmp_path))


def test_a_student_keeps_the_kinds_of_its_layers():
  assert gemma3.TINY.keep_layers((1, 2)).layer_types == (gemma3.GLOBAL, gemma3.LOCAL)


def test_the_soft_cap_is_applied_wherever_logits_are_used():
  """Compares training, gradients, evaluation, records and an online teacher with full logits."""
  config, compute = gemma3.CONFIGS["tiny-cap"], layers.ComputeConfig()
  model = jax.jit(lambda key: gemma3.Model(config, key))(jax.random.key(0))
  model.embed = model.embed.replace(50 * model.embed[...])  # so that the cap has an effect
  tokens = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
  inputs, labels = parity.plain_inputs(tokens), jnp.asarray(np.roll(tokens, -1, 1))
  batch = Batch(inputs, labels, jnp.ones((2, 16), bool))

  def loss(model):
    out = model(inputs, compute)
    raw_BTV = out.hidden_BTD @ out.head_VD.T
    logp_BTV = jax.nn.log_softmax(2 * jnp.tanh(raw_BTV / 2))
    logp_BT = jnp.take_along_axis(logp_BTV, labels[..., None], -1)[..., 0]
    return -jnp.mean(logp_BT), (raw_BTV, logp_BT, out)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (want, (raw_BTV, logp_BT, out)), want_grad = run(model)
  assert jnp.abs(raw_BTV).max() > 6

  made = step.Step(
    losses={"hard": ce.Loss()},
    learning_rate=lambda n: 1.0,
    optimizer=optax.sgd(1.0),
    student=compute,
    teacher=compute,
    chunk=5,
  )
  weights, trained = {"hard": jnp.float32(1)}, (model, {})
  grad = jax.jit(jax.value_and_grad(made.loss, has_aux=True))
  (got, _), (got_grad, _) = grad(trained, batch, step.Fixed({}, 0, jnp.float32(32)), weights)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
    assert parity.error(a, b) < parity.GRADIENT

  np.testing.assert_allclose(lm.score(model, batch, compute, 5).value(), want, rtol=1e-5)
  teacher_out, _ = outputs.run_teacher(model, inputs, compute)
  means = lm.compare({"teacher": teacher_out, "student": teacher_out}, batch, 5)
  for name in ("teacher", "student"):
    np.testing.assert_allclose(means[name]["ce"].value(), want, rtol=1e-5)
  capped_BTV = fused_head.soft_cap(raw_BTV, out.soft_cap)
  dense, own = teacher_out.log_probs(capped_BTV)
  np.testing.assert_allclose(dense, own, rtol=1e-5, atol=1e-5)
  spec = sampler.SamplerSpec(4, "topk")
  recorded = sampler.summarise(
    out.hidden_BTD, out.head_VD, labels, None, spec, chunk=5, soft_cap=out.soft_cap
  )
  np.testing.assert_allclose(recorded["label_logp"], logp_BT, rtol=1e-5, atol=1e-5)
