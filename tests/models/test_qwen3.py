"""Qwen3, dense and of experts, against transformers (torch, float32), and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from distill_jax.errors import InputError
from distill_jax.models import qwen3
from distill_jax.nn import layers, sharding

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
CASES = {
  "dense": ("qwen3", {}),
  "dense, tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 20, "rms_norm_eps": 1e-2}),
  "experts": ("qwen3_moe", EXPERTS),
  "experts, weights that sum to 1": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
  "one expert of many": ("qwen3_moe", EXPERTS | {"num_experts": 40, "num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_logits_match_transformers(case, tmp_path):
  kind, changes = CASES[case]
  theirs = parity.torch_model(kind, **changes)
  errors = parity.forward_errors(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert max(errors) < parity.FORWARD, errors


@pytest.mark.parametrize("case", ["dense", "experts"])
def test_gradients_match_transformers(case, tmp_path):
  kind, changes = CASES[case]
  theirs = parity.torch_model(kind, **changes)
  worst = parity.worst_gradient(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert worst[0] < parity.GRADIENT, worst


SLICED = {"experts": (None, None), "expert_mlp": ("tensor", "tensor")}
RULES = {"whole experts": {}, "slices of every expert": SLICED}


@pytest.mark.parametrize("rules", RULES)
def test_experts_on_a_mesh_are_those_on_one_device(rules):
  B, T, D, E, F, K = 4, 6, 8, 6, 10, 2
  normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  weight_BTK, ids_BTK = jax.lax.top_k(normal(0, B, T, E), K)
  weights = normal(2, E, D, F), normal(3, E, D, F), normal(4, E, F, D)
  args = normal(1, B, T, D), weight_BTK, *weights
  rules = sharding.Rules(tuple((sharding.TABLE | RULES[rules]).items()))

  def loss(x_BTD, weight_BTK, *weights):
    return jnp.sum(layers.experts(x_BTD, ids_BTK, weight_BTK, *weights, rules) ** 2)

  run = lambda: jax.jit(jax.value_and_grad(loss, argnums=range(5)))(*args)
  want = run()
  with jax.set_mesh(sharding.make_mesh(1, 2, 2)):
    got = run()
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # Two devices' partial sums, in float32.
    assert parity.error(a, b) < 2e-6


def test_experts_sharded_like_the_batch_are_refused():
  table = sharding.TABLE | {"experts": ("fsdp", "fsdp")}
  model = jax.eval_shape(lambda k: qwen3.Model(qwen3.CONFIGS["tiny-moe"], k), jax.random.key(0))
  rules = sharding.Rules(tuple((table | {"embed": (None, None)}).items()))
  inputs = parity.plain_inputs(np.zeros((4, 8), np.int32))
  with (
    jax.set_mesh(sharding.make_mesh(1, 2, 2)),
    pytest.raises(InputError, match="'fsdp', over which the batch is sharded"),
  ):
    jax.eval_shape(lambda m: m(inputs, layers.ComputeConfig(rules=rules)), model)


@pytest.mark.parametrize(
  "change, word",
  [
    ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ({"mlp_only_layers": [0]}, "mlp_only_layers"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    ({"num_experts": 0}, "num_experts is 0"),
    ({"moe_intermediate_size": None}, "moe_intermediate_size is None; expected a number"),
    ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ({"attention_bias": True}, "attention_bias"),
    (
      {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
      "sliding_window is 8; .*use_sliding",
    ),
  ],
)
def test_an_unsupported_config_is_refused(change, word):
  with pytest.raises(InputError, match=word):
    qwen3.Config.from_hf(qwen3.CONFIGS["tiny-moe"].to_hf() | change)


def test_config_json_is_read_like_transformers():
  """This includes the name that transformers 5 writes."""
  config = qwen3.CONFIGS["tiny-moe"]
  read = parity.transformers.Qwen3MoeConfig.from_dict(config.to_hf())
  assert (read.num_experts, read.norm_topk_prob, read.mlp_only_layers) == (8, True, [])
  assert qwen3.Config.from_hf(read.to_dict()) == config
  dense = dataclasses.replace(qwen3.TINY, rope_theta=1e6)
  assert qwen3.Config.from_hf(parity.transformers.Qwen3Config(**dense.to_hf()).to_dict()) == dense
