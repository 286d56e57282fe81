"""FLOPs, active weights and attended pairs agree with XLA, published numbers and arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preflight_config import model_config

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.models import llama, loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import fused_head
from distill_jax.nn.layers import ComputeConfig
from distill_jax.preflight import flops
from distill_jax.preflight.options import PreflightOptions
from distill_jax.types import Inputs


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
  scores = want["attention"] / 6  # half of one of the 3 passes
  assert again() == again(attention="xla") == scores
  assert again(remat="full") == (want["layers"] + want["attention"]) / 3 + scores
  assert again(remat="dots") == want["attention"] / 3 + scores
  assert flops.model_flops(flops.step_flops(c, "record", 4)) == sum(want.values()) / 3
  online = dataclasses.replace(c, train=dataclasses.replace(c.train, online=True))
  assert flops.step_flops(online, "train", 4)["teacher"] == sum(want.values()) / 3
  frozen = (("model.embed_tokens",), 2), (("model.layers",), 3)
  for prefixes, products in frozen:  # the embedding is the head
    student = dataclasses.replace(c.student, train="frozen", frozen=prefixes)
    head = flops.step_flops(dataclasses.replace(c, student=student), "train", 4)["head"]
    assert head == products * want["head"] / 3


@pytest.mark.parametrize("family, shape", [("llama", "tiny-window"), ("gemma3", "tiny")])
def test_pairs_of_documents_are_counted_one_by_one(family, shape):
  """Rows of 300 with documents of 130: two whole ones and one of 40, in three blocks of 128."""
  c = loading.open_source(ModelOptions(family=family, shape=shape)).decoder_config
  T, document = 300, 130
  back = np.arange(T)[:, None] - np.arange(T)
  documents = np.arange(T) // document
  pairs, blocks = 0, 0
  for layer in range(c.num_hidden_layers):
    seen = (back >= 0) & (back < (c.window_at(layer) or T)) & (documents[:, None] == documents)
    pairs += seen.sum()
    blocks += np.pad(seen, (0, 84)).reshape(3, 128, 3, 128).any((1, 3)).sum()
  assert flops.pairs_of_row(c, T, document) == pairs
  assert flops.computed_pairs_of_row(c, "auto", T, document) == blocks * 128**2
  assert flops.computed_pairs_of_row(c, "xla", T, document) == c.num_hidden_layers * T**2


def test_attention_of_short_documents_costs_less():
  """Attention and what is computed around it are proportional to pairs and blocks of a row."""
  c = config.resolve(model_config())
  c = dataclasses.replace(c, data=dataclasses.replace(c.data, seq_len=1_024))
  of = lambda n: flops.step_flops(
    dataclasses.replace(c, preflight=PreflightOptions(document_tokens=n)), "train", 4
  )
  whole, short = of(0), of(64)
  assert short["attention"] / whole["attention"] == (16 * 64 * 65) / (1_024 * 1_025)
  computed = lambda f: f["attention"] * 7 / 6 + f["masked"]  # one of six products again
  assert computed(short) / computed(whole) == pytest.approx(2 / 3)  # blocks of 512: 2 of 3
  assert short["layers"] == whole["layers"] and of(2_000) == whole


def test_a_negative_document_length_is_refused():
  with pytest.raises(InputError, match="preflight.document_tokens is -1; expected at least 0"):
    PreflightOptions(document_tokens=-1)
