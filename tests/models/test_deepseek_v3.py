"""DeepSeek-V3 against transformers (torch, float32), and what its config.json may say."""

import functools
import json

import jax
import numpy as np
import parity
import pytest
from safetensors.numpy import load_file, save_file

from distill_jax.errors import InputError
from distill_jax.hub import load
from distill_jax.hub.export import export_model
from distill_jax.hub.pretrained import open_model
from distill_jax.models import deepseek_v3
from distill_jax.models._experts import grouped_top_k
from distill_jax.nn import layers, sharding

YARN = {
  "rope_type": "yarn",
  "rope_theta": 10_000.0,
  "factor": 40.0,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
  "original_max_position_embeddings": 24,
  "beta_fast": 32,
  "beta_slow": 1,
}
CASES = {
  "as published": {"rope_parameters": YARN},
  "one query matrix": {"q_lora_rank": None, "norm_topk_prob": False},
  "two sharpenings": {"rope_parameters": YARN | {"mscale": 0.7}, "rope_interleave": False},
  "no dense layer, one group": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
  "dense layers alone": {"first_k_dense_replace": 3, "rms_norm_eps": 1e-2},
}


def torch_model(case: str = "as published", **more):
  return parity.torch_model("deepseek_v3", **parity.DEEPSEEK | CASES[case] | more)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_logits_match_transformers(case, tmp_path):
  theirs = torch_model(case)
  errors = parity.forward_errors(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert max(errors) < parity.FORWARD, errors


@pytest.mark.parametrize("case", ["as published", "dense layers alone"])
def test_gradients_match_transformers(case, tmp_path):
  theirs = torch_model(case)
  worst = parity.worst_gradient(theirs, parity.ours_from(theirs, tmp_path), parity.tokens())
  assert worst[0] < parity.GRADIENT, worst


def test_the_balance_bias_affects_only_the_choice_of_experts():
  # 8 experts in 4 groups; 3 experts in the best 2 groups
  options = {"k": 3, "groups": 4, "best_groups": 2, "normalise": True}
  choose = jax.jit(functools.partial(grouped_top_k, **options))
  score = np.array([0.9, 0.1, 0.8, 0.7, 0.2, 0.3, 0.6, 0.5], np.float32)[None, None]
  ids, weight = choose(score, np.zeros(8, np.float32))
  # Groups sum to 1.0, 1.5, 0.5 and 1.1, so the second and the last are chosen.
  np.testing.assert_array_equal(ids[0, 0], [2, 3, 6])
  np.testing.assert_allclose(weight[0, 0], np.array([8, 7, 6]) / 21, rtol=1e-6)
  ids, weight = choose(score, np.eye(8, dtype=np.float32)[4])
  np.testing.assert_array_equal(sorted(ids[0, 0]), [2, 3, 4])
  assert weight[0, 0, list(ids[0, 0]).index(4)] == pytest.approx(0.2 / 1.7)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
def test_the_balance_stays_float32(mesh, tmp_path):
  """The bias stays float32 when other weights are read, used and written as bfloat16."""
  theirs = torch_model(vocab_size=96, kv_lora_rank=24).bfloat16()
  for layer in theirs.model.layers[1:]:
    layer.mlp.gate.e_score_correction_bias = parity.torch.rand(12)
  theirs.save_pretrained(tmp_path / "a")
  mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])
  compute = layers.ComputeConfig("bfloat16")
  model = load.load_model(open_model(str(tmp_path / "a")), mesh, compute, "bfloat16")
  assert (
    model.layers.balance.dtype == compute.cast_and_gather(model.layers.balance).dtype == np.float32
  )
  assert (
    model.layers.experts.up.dtype
    == compute.cast_and_gather(model.layers.experts.up).dtype
    == "bfloat16"
  )
  export_model(model, tmp_path / "b", tokenizer=None, generation={}, card="", shard_bytes=20_000)
  got = {}
  for f in (tmp_path / "b").glob("*.safetensors"):
    got |= load_file(f)
  want = load_file(tmp_path / "a" / "model.safetensors")
  assert got.keys() == want.keys()
  assert all(x.dtype == want[n].dtype and x.tobytes() == want[n].tobytes() for n, x in got.items())
  index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in want.values())


def test_multi_token_prediction_layers_are_skipped(tmp_path):
  ours = parity.ours_from(torch_model(), tmp_path)
  path = tmp_path / "model.safetensors"
  tensors, extra = load_file(path), np.ones((3, 4), np.float32)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  read = lambda: load.load_model(open_model(str(tmp_path)), mesh, layers.ComputeConfig())
  save_file(tensors | {"model.layers.3.eh_proj.weight": extra}, path)
  for a, b in zip(jax.tree.leaves(read()), jax.tree.leaves(ours), strict=True):
    np.testing.assert_array_equal(a, b)
  save_file(tensors | {"model.layers.4.eh_proj.weight": extra}, path)  # config.json has 1
  with pytest.raises(InputError, match="contains model.layers.4.eh_proj.weight"):
    read()
  # A layer that is missing in config.json must not be dropped silently.
  save_file(tensors, path)
  hf = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(
    json.dumps(hf | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "num_mtp_layers": 0})
  )
  with pytest.raises(InputError, match="contains model.layers.2"):
    read()


@pytest.mark.parametrize("kept", [(0, 3, 1), (3,), (0,)])
def test_a_student_keeps_dense_and_sparse_layers(kept, tmp_path):
  changes = parity.DEEPSEEK | {"num_hidden_layers": 4, "first_k_dense_replace": 1}
  theirs = parity.torch_model("deepseek_v3", **changes)
  theirs.save_pretrained(tmp_path)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  opened = open_model(str(tmp_path))
  student = load.load_model(opened, mesh, layers.ComputeConfig(), keep_layers=kept)
  assert student.config.first_k_dense_replace == (0 in kept)
  theirs.model.layers = parity.torch.nn.ModuleList([theirs.model.layers[i] for i in kept])
  theirs.config.num_hidden_layers, theirs.config.use_cache = len(kept), False
  errors = parity.forward_errors(theirs, student, parity.tokens())
  assert max(errors) < parity.FORWARD, errors
  with pytest.raises(InputError, match="keep_layers is .*dense layers, i.e. the first 1, before"):
    opened.config.keep_layers((1, 0))


@pytest.mark.parametrize(
  "change, word",
  [
    (
      {"num_key_value_heads": 2},
      "num_key_value_heads in config.json is 2; expected num_attention_heads, 4",
    ),
    ({"n_group": 3}, "n_routed_experts is 8; expected a multiple of n_group, 3"),
    ({"topk_group": 5}, "topk_group is 5; expected at most n_group, 4"),
    ({"n_group": 8}, "at least 2 experts per group"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; expected at most 4"),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"moe_layer_freq": 2}, "moe_layer_freq"),
    ({"attention_bias": True}, "attention_bias"),
    ({"qk_rope_head_dim": 5}, "rope rotates an even part, not 5"),
    ({"v_head_dim": 13}, "v_head_dim is 13"),
    ({"n_shared_experts": 0}, "n_shared_experts"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
    ({"rope_parameters": YARN | {"mscale": -1.0}}, "mscale"),
  ],
)
def test_an_unsupported_config_is_refused(change, word):
  with pytest.raises(InputError, match=word):
    deepseek_v3.Config.from_hf(deepseek_v3.TINY.to_hf() | change)


def test_the_published_config_json_gives_the_named_shape():
  """Uses the values of DeepSeek-V3's config.json, with the names of that version."""
  hf = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "ep_size": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 1,
    "rope_scaling": {
      "beta_fast": 32,
      "beta_slow": 1,
      "factor": 40,
      "mscale": 1.0,
      "mscale_all_dim": 1.0,
      "original_max_position_embeddings": 4096,
      "type": "yarn",
    },
  }
  read = deepseek_v3.Config.from_hf(hf)
  assert read.num_nextn_predict_layers == 1 and read.ignores_tensor("model.layers.61.enorm.weight")
  again = deepseek_v3.Config.from_hf(read.to_hf())  # without such a layer
  assert again == deepseek_v3.CONFIGS["deepseek-v3"]
