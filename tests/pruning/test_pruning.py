"""Students cut out of teachers, against transformers: what is dead can go, and nothing else does.

In each family's model some heads, channels, experts and a whole layer are made to add nothing. A
student without them has to say what the teacher says. That it is those that go is importance
put right; that the logits stay is the cut, the norms' correction, the config and the export.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from distill_jax.hub import declared, export, load
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding
from distill_jax.pruning import choose, cut, experts, factorise, measure, shapes, windows
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.records import collate

torch, transformers = parity.torch, parity.transformers
HOW = layers.ComputeConfig()
D, H, F, DEAD_LAYER = 48, 4, 80, 1
HALF = {"hidden": 32, "heads": 2, "intermediate": 48}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
DEEPSEEK = parity.DEEPSEEK | {"kv_lora_rank": 24, "num_mtp_layers": 0}
CASES = {  # name: (model_type, changes of its config, options of shrink)
  "llama": ("llama", {"tie_word_embeddings": True}, HALF),
  "qwen2": ("qwen2", {}, HALF | {"kv_heads": 1, "heads": 0}),
  "qwen3_moe": ("qwen3_moe", MOE, {"hidden": 32, "heads": 2, "expert_intermediate": 12}),
  "gemma3": ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 2}, HALF),
  "deepseek_v3": ("deepseek_v3", DEEPSEEK, HALF | {"experts": 8, "expert_intermediate": 12}),
}
TOKENS = parity.tokens()[:, :24]


def batch(tokens_BT=TOKENS):
  row = lambda t: {"tokens_T": t, "segments_T": np.ones_like(t), "mask_T": np.ones(len(t), bool)}
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  rows = sharding.rows(mesh, len(tokens_BT))
  return collate.to_device(collate.collate([row(t) for t in tokens_BT]), rows)


def kill(weights: dict, s: ShrinkOptions, c) -> None:
  """Sets parts of torch's tensors to 0, different ones in every layer."""
  rng = np.random.default_rng(0)
  some = lambda n, k: rng.permutation(n)[:k]
  channels = some(D, D - s.hidden)
  kv = c.num_key_value_heads
  for name, w in weights.items():
    if "norm" in name or w.ndim < 2:
      continue
    if name.endswith("embed_tokens.weight"):
      w *= 8  # so that the norms' epsilon is negligible
      w[:, channels] = 0
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
      w[channels] = 0
      if f"layers.{DEAD_LAYER}." in name:
        w[:] = 0
    if name.endswith("o_proj.weight"):
      heads = w.reshape(D, kv, H // kv, -1)
      if s.kv_heads:
        heads[:, rng.integers(kv)] = 0  # whole groups
      elif kv == H:
        heads[:, some(kv, kv - s.heads)] = 0
      else:
        for g in range(kv):
          heads[:, g, rng.integers(H // kv)] = 0
    if name.endswith("down_proj.weight"):
      routed = ".experts." in name
      # Two shared experts are stored as one of twice the width.
      left = {F: s.intermediate, 40: 2 * s.expert_intermediate, 20: s.expert_intermediate}
      dead = some(w.shape[1], w.shape[1] - left[w.shape[1]])
      half = len(dead) // 2
      w[:, dead[:half]] = 0  # their outputs are not read
      up = weights[name.replace("down_proj", "up_proj")]
      up[dead[half:]] = 0  # their outputs are 0
      assert routed or w.shape[1] != 20
  for name, b in weights.items():
    if name.endswith("e_score_correction_bias"):  # one expert of each group is never chosen
      b.reshape(4, 3)[np.arange(4), rng.integers(0, 3, 4)] = -1e9


def logits(model, tokens_BT) -> np.ndarray:
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens_BT)).long()).logits.numpy()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """(options, folder of the teacher with dead parts, our model of it, its importance)."""
  model_type, changes, asked = CASES[request.param]
  s = ShrinkOptions(layers=2, layers_by="influence", **asked)
  folder = tmp_path_factory.mktemp(request.param)
  theirs = parity.torch_model(model_type, vocab_size=96, **changes)
  parity.ours_from(theirs, folder / "whole")
  opened = open_model(str(folder / "whole"))
  read = {n: opened.weights.read(n).copy() for n in opened.weights.names()}
  kill(read, s, opened.config)
  from safetensors.numpy import save_file

  save_file(read, folder / "whole" / "model.safetensors", {"format": "pt"})
  ours = load.load_model(
    open_model(str(folder / "whole")), sharding.make_mesh(devices=jax.devices()[:1]), HOW
  )
  # So many tokens that every expert is used by several, whatever the rounding of its router.
  batches = [batch(parity.tokens(seed) % 96) for seed in (0, 2, 3, 4)]
  within = bool(s.expert_intermediate)
  return s, opened.family, folder, ours, measure.importance(ours, batches, HOW, within)


def student_of(s, family, ours, measured):
  config = shapes.narrowed(s, family, ours.config)
  influence = np.concatenate(
    [measured[n]["influence"] for n, _, _ in ours.layer_stacks(ours.config)]
  )
  kept_layers = choose.influential(s.layers or ours.config.num_hidden_layers, influence)
  config = config.keep_layers(kept_layers)
  kept = cut.keep(s, family, ours.config, config, kept_layers, measured)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return cut.cut(ours, family, config, kept, mesh, HOW.rules), kept


def test_removing_dead_parts_does_not_change_outputs(case):
  s, family, folder, ours, measured = case
  student, kept = student_of(s, family, ours, measured)
  assert kept.layers == tuple(i for i in range(3) if i != DEAD_LAYER)
  if s.experts:  # merging unused experts has no effect
    merged = experts.merge(ours, kept, measured)
    jax.tree.map(np.testing.assert_array_equal, merged, ours)
  target = folder / "student"
  export.export_model(student, target, tokenizer=None, generation={}, card="", dtype="float32")
  from_folder = lambda f: transformers.AutoModelForCausalLM.from_pretrained(
    f, attn_implementation="eager", output_loading_info=True
  )
  (small, loaded), (whole, _) = from_folder(target), from_folder(folder / "whole")
  assert not any(loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters()) / 2
  tokens = parity.tokens(1)[:, :40] % 96  # other tokens than in calibration
  want = logits(whole, tokens)
  assert parity.error(logits(small, tokens), want) < 2e-4  # the norms' epsilon
  out = jax.jit(lambda m, i: m(i, HOW))(student, parity.plain_inputs(tokens))
  z_BTV = np.asarray(out.hidden_BTD @ out.head_VD.T)
  assert parity.error(z_BTV, logits(small, tokens)) < parity.FORWARD


def test_a_student_with_all_parts_is_unchanged(case):
  _, family, _, ours, measured = case
  c, same = ours.config, {}
  for key in shapes.SIZES:
    if shapes.SIZES[key].axis in shapes.axis_names(family, c):
      same[key] = getattr(c, shapes.field(c, key))
  student, _ = student_of(ShrinkOptions(layers=3, **same), family, ours, measured)
  assert student.config == c
  pairs = zip(params.named_params(ours), params.named_params(student), strict=True)
  for (name, a), (_, b) in pairs:
    np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]), err_msg=name)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
  theirs = parity.torch_model("qwen2", vocab_size=96, num_key_value_heads=4)
  return theirs, parity.ours_from(theirs, tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def measured(qwen2):
  return measure.importance(qwen2[1], [batch(TOKENS % 96)], HOW, False)


def test_importance_is_the_contribution_to_the_residual(qwen2, measured):
  """Compares with transformers, by hooks on the inputs of o_proj and down_proj."""
  theirs, _ = qwen2
  (embedded, *outputs), _, _ = parity.torch_outputs(theirs, TOKENS % 96)
  states = [embedded, *outputs]
  cosine = lambda a, b: (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
  want = [1 - cosine(a, b).mean() for a, b in zip(states, outputs, strict=False)]
  np.testing.assert_allclose(measured["layers"]["influence"], want, rtol=1e-4)

  read: list = []
  keep = lambda m, args: read.append(args[0].detach().numpy())
  layer = theirs.model.layers[1]
  hooks = [m.register_forward_pre_hook(keep) for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]
  logits(theirs, TOKENS % 96)
  for h in hooks:
    h.remove()
  a_BTHh, h_BTF = read[0].reshape(*TOKENS.shape, H, -1), read[1]
  o_HhD = layer.self_attn.o_proj.weight.detach().numpy().T.reshape(H, -1, D)
  added_BTHD = np.einsum("BTHh,HhD->BTHD", a_BTHh, o_HhD)
  root = lambda x, axes: np.sqrt((x**2).sum(-1).mean(axes))
  np.testing.assert_allclose(measured["layers"]["heads"][1], root(added_BTHD, (0, 1)), rtol=1e-4)
  down_FD = layer.mlp.down_proj.weight.detach().numpy().T
  want = np.sqrt((h_BTF**2).mean((0, 1)) * (down_FD**2).sum(-1))
  np.testing.assert_allclose(measured["layers"]["mlp"][1], want, rtol=1e-4)
  energy = states[1] ** 2 / (states[1] ** 2).mean(-1, keepdims=True)
  got = measured["layers"]["attn_norm.energy"][1]
  np.testing.assert_allclose(got, energy.mean((0, 1)), rtol=1e-4)


def test_padding_does_not_count(qwen2, measured):
  row = {"tokens_T": TOKENS[0] * 0 + 7, "segments_T": TOKENS[0] * 0, "mask_T": TOKENS[0] < 0}
  tokens = [{"tokens_T": t % 96, "segments_T": t * 0 + 1, "mask_T": t >= 0} for t in TOKENS]
  padded = jax.tree.map(jnp.asarray, collate.collate([*tokens, row]))
  got = measure.importance(qwen2[1], [padded], HOW, False)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, measured)


def test_a_skipped_layer_is_a_model_without_it(qwen2):
  """Compares the loss with a skipped layer to that of a model without it."""
  _, ours = qwen2
  b = batch(TOKENS % 96)
  run = measure.make_loss(HOW, 16, 96)
  three = measure.loss(run, ours, [b, b])
  assert three == pytest.approx(ce_of(ours, b), rel=1e-5)
  pruned = jax.tree.map(lambda x: x, ours)
  pruned.layers = params.map_params(lambda v: v.replace(v[...][jnp.array([0, 2])]), ours.layers)
  pruned.config = ours.config.keep_layers((0, 2))
  two = measure.loss(run, ours, [b, b], without=[1])
  assert two == pytest.approx(ce_of(pruned, b), rel=1e-5) != three


def ce_of(model, b) -> float:
  out = jax.jit(lambda m: m(b.inputs, HOW))(model)
  logp_BTV = jax.nn.log_softmax(out.hidden_BTD @ out.head_VD.T)
  picked_BT = jnp.take_along_axis(logp_BTV, b.labels_BT[..., None], -1)[..., 0]
  return -float(jnp.where(b.mask_BT, picked_BT, 0).sum() / b.mask_BT.sum())


def test_merging_equal_neighbours_does_not_change_outputs(qwen2, measured):
  """Four key/value heads, pairwise equal with their biases, are merged into two."""
  _, ours = qwen2
  twin = jax.tree.map(lambda x: x, ours)
  double = lambda x, axis: jnp.repeat(jnp.take(x, np.array([0, 2]), axis), 2, axis)
  for name in ("k", "v"):
    v = getattr(ours.layers, name)
    setattr(twin.layers, name, v.replace(double(v[...], 2)))
    b = getattr(ours.layers, f"{name}_bias")
    b_LGh = b[...].reshape(3, 4, -1)
    setattr(twin.layers, f"{name}_bias", b.replace(double(b_LGh, 1).reshape(b.shape)))
  s = ShrinkOptions(kv_heads=2, kv_heads_by="merge")
  student, _ = student_of(s, "qwen2", twin, measured)
  assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (4, 2)
  inputs = parity.plain_inputs(TOKENS % 96)
  run = jax.jit(lambda m: m(inputs, HOW).hidden_BTD)
  assert parity.error(run(student), run(twin)) < parity.FORWARD


ROPES = [
  {"rope_type": "default", "rope_theta": 1e4},
  {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
  {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
  },
  {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: r["rope_type"])
def test_a_llama_with_windows_is_a_qwen2(rope, tmp_path):
  """With a window as long as the text, the Qwen2 in transformers equals the Llama.

  With a shorter window, it equals our model.
  """
  theirs = parity.torch_model("llama", rope_parameters=rope, tie_word_embeddings=True)
  ours = parity.ours_from(theirs, tmp_path / "llama")
  logits = lambda m: m(torch.from_numpy(TOKENS).long()).logits.detach().numpy()
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for window in (TOKENS.shape[1], 4):
    c = windows.windowed(ShrinkOptions(window=window, global_every=2), ours.config)
    student = windows.with_windows(jax.tree.map(jnp.copy, ours), c, mesh, HOW.rules)
    to = tmp_path / str(window)
    export.export_model(student, to, tokenizer=None, generation={}, card="", dtype="float32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    assert loaded.config.model_type == "qwen2" and loaded.config.layer_types == [
      "sliding_attention",
      "full_attention",
      "sliding_attention",
    ]
    if window == 4:
      out = jax.jit(lambda m: m(parity.plain_inputs(TOKENS), HOW))(student)
      assert parity.error(out.hidden_BTD @ out.head_VD.T, logits(loaded)) < parity.FORWARD
      assert parity.error(logits(loaded), logits(theirs)) > 0.01
    else:
      assert parity.error(logits(loaded), logits(theirs)) < parity.FORWARD


def test_any_number_of_layers_can_be_chosen():
  assert choose.even(3, 9) == (0, 4, 8) and choose.even(1, 9) == (0,)
  deeper = choose.even(14, 9)
  assert set(deeper) == set(range(9)) and list(deeper) == sorted(deeper) and len(deeper) == 14
  assert choose.ends(5, 9) == (0, 1, 2, 7, 8) and choose.ends(2, 9) == (0, 8)
  assert choose.influential(2, np.array([0.3, 0.1, 0.2, 0.5])) == (0, 3)


def test_the_loss_measures_removed_layers_together():
  """Either of layers 1 and 2 can be removed but not both; layer 0 is next."""

  def loss(without):
    return 4.0 * (3 in without) + 1.0 * (0 in without) + 9.0 * ({1, 2} <= set(without))

  assert list(choose.removal_order(4, loss)) == [1, 0, 3, 2]


def test_query_heads_stay_in_their_group():
  score = np.array([[1.0, 9, 3, 2, 0, 7, 5, 4]])  # 4 groups of 2
  q, kv = choose.heads(score, groups=4, new_heads=2, new_groups=2, merge=False)
  np.testing.assert_array_equal(kv, [[0, 2]])  # by |1 9|, |3 2|, |0 7|, |5 4|
  np.testing.assert_array_equal(q, [[1, 5]])
  q, kv = choose.heads(score, groups=4, new_heads=4, new_groups=2, merge=True)
  assert kv is None
  np.testing.assert_array_equal(q, [[1, 2, 5, 6]])  # the two best of 0 to 3, and of 4 to 7


def test_merging_experts_ignores_the_order_of_channels():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  layer = {"gate": draw(4, 6, 10), "up": draw(4, 6, 10), "down": draw(4, 10, 6)}
  order, router = rng.permutation(10), draw(6, 4)
  for name, w in layer.items():  # expert 3 is expert 1 reordered, times 3
    w[3] = 3 * w[1][order] if name == "down" else w[1][:, order]
  router[:, 3] = 2 * router[:, 1]
  before = {name: w.copy() for name, w in layer.items()}
  experts._merge_layer(layer, router, np.array([0, 1, 2]), np.array([0.1, 0.3, 0.5, 0.1]))
  for name in ("gate", "up"):
    np.testing.assert_allclose(layer[name][:3], before[name][:3], rtol=1e-5)
  np.testing.assert_allclose(layer["down"][1], 1.5 * before["down"][1], rtol=1e-5)
  np.testing.assert_array_equal(layer["down"][[0, 2]], before["down"][[0, 2]])


def test_factorise_is_the_best_low_rank_approximation(qwen2):
  _, ours = qwen2
  student, about = factorise.factorise(ours, {"mlp.down_proj": 5, "q_proj": 3}, 2)
  assert set(about) == {"layers.down", "layers.q"}
  for path, v in params.named_params(student):
    was = dict(params.named_params(ours))[path]
    if path not in about:
      np.testing.assert_array_equal(v[...], was[...])
      continue
    for i in range(3):
      m, w = (declared.Layout(x).to_stored(np.asarray(x[...])[i], np.dtype("f4")) for x in (v, was))
      u, s, vt = np.linalg.svd(w)
      r = about[path]["rank"]
      np.testing.assert_allclose(m, u[:, :r] * s[:r] @ vt[:r], atol=1e-5)
  assert about["layers.down"]["bytes"] == 3 * D * F * 2
  assert about["layers.down"]["bytes_as_factors"] == 3 * 5 * (D + F) * 2
  again, more = factorise.factorise(student, {"mlp.down_proj": 5}, 2)
  assert more["layers.down"]["norm_kept"] == pytest.approx(1, abs=1e-6)
  assert parity.error(again.layers.down[...], student.layers.down[...]) < 1e-5


def test_cost_counts_the_parameters_that_a_token_reads():
  c = dataclasses.replace(
    shapes.registry.load("models", "qwen3").CONFIGS["tiny-moe"], tie_word_embeddings=False
  )
  cost = shapes.cost("qwen3", c)
  routed = 3 * c.num_hidden_layers * c.hidden_size * c.moe_intermediate_size  # of one expert
  table = c.vocab_size * c.hidden_size
  assert cost.parameters - cost.active == table + (8 - 3) * routed
