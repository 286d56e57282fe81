"""Low-rank adapters: PEFT's numbers, and a base that stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import seq2seq_pairs
import slow
import steps as training_steps

from distill_jax.errors import InputError
from distill_jax.hub import declared
from distill_jax.models import deepseek_v3, llama, qwen3
from distill_jax.models.trainables import Lora
from distill_jax.nn import layers, lora, params, sharding
from distill_jax.nn.lora import LoraOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ALL = LoraOptions().targets
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FAMILIES = {
  "llama": ({}, ALL),
  "qwen3_moe": (
    {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ("self_attn.q_proj", "v_proj", "o_proj"),
  ),
  "deepseek_v3": (parity.DEEPSEEK, LATENT),
}


@functools.cache
def random_base():
  return jax.jit(lambda key: llama.Model(llama.TINY, key))(jax.random.key(0))


init = jax.jit(lora.init, static_argnums=1)


def random_adapters(model, spec, seed=1):
  """Returns adapters with random factors, since with B = 0 the gradient of A is 0."""
  adapters = init(model, spec, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  draw = lambda v: v.replace(jnp.asarray(rng.normal(0, 0.2, v.shape), jnp.float32))
  return params.map_params(draw, adapters)


def as_stored(adapters) -> dict[str, np.ndarray]:
  return {
    name: declared.Layout(v).to_stored(np.asarray(v[...])[at], np.dtype(np.float32))
    for _, v in params.named_params(adapters)
    for name, at in declared.tensors(v)
  }


@pytest.mark.parametrize("family", slow.all_but(("llama",), FAMILIES))
def test_logits_and_gradients_match_peft(family, tmp_path):
  """Compares logits and the gradients of all adapters, with the same weights and factors."""
  changes, targets = FAMILIES[family]
  theirs = parity.torch_model(family, **changes)
  base, spec = (
    parity.ours_from(theirs, tmp_path),
    LoraOptions(rank=3, alpha=4.0, targets=targets),
  )
  adapters, tokens_BT = random_adapters(base, spec), parity.tokens()
  theirs = peft.get_peft_model(
    theirs,
    peft.LoraConfig(
      r=3,
      lora_alpha=4.0,
      target_modules=list(targets),
      task_type="CAUSAL_LM",
    ),
  ).eval()
  stored = as_stored(adapters)
  state = peft.get_peft_model_state_dict(theirs)
  assert {n: x.shape for n, x in stored.items()} == {n: tuple(x.shape) for n, x in state.items()}
  given = {n: torch.from_numpy(x.copy()) for n, x in stored.items()}
  peft.set_peft_model_state_dict(theirs, given)
  theirs_tokens = torch.from_numpy(tokens_BT).long()
  out = theirs(theirs_tokens, labels=theirs_tokens)
  out.loss.backward()
  joined = lora.with_adapters(base, adapters)
  assert parity.error(parity.plain_logits(joined, tokens_BT), out.logits.detach()) < parity.FORWARD

  def loss(adapters):
    out = lora.with_adapters(base, adapters)(parity.plain_inputs(tokens_BT), layers.ComputeConfig())
    logp_BTV = jax.nn.log_softmax(out.hidden_BTD[:, :-1] @ out.head_VD.T)
    return -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], -1))

  got = as_stored(jax.jit(jax.grad(loss))(adapters))
  name = lambda n: n.replace(".default.", ".")
  want = {name(n): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
  assert got.keys() == want.keys()
  worst = max((parity.error(got[n], want[n]), n) for n in want)
  assert worst[0] < parity.GRADIENT, worst


@pytest.mark.parametrize("kind", slow.all_but(("whisper",), ("t5", "marian", "whisper")))
def test_encoders_have_adapters_as_in_peft(kind, tmp_path):
  """A target names the layers of the encoder and of the decoder, and attention to the source."""
  _, theirs, _, base = seq2seq_pairs.open_pair(kind, tmp_path)
  targets = ("q", "v") if kind == "t5" else ("q_proj", "fc1")
  spec = LoraOptions(rank=3, alpha=4.0, targets=targets)
  options = peft.LoraConfig(r=3, lora_alpha=4.0, target_modules=list(targets))
  theirs = peft.get_peft_model(theirs, options).eval()
  adapters = random_adapters(base, spec)
  stored = as_stored(adapters)
  state = peft.get_peft_model_state_dict(theirs)
  assert any("encoder" in name for name in stored)
  assert {n: x.shape for n, x in stored.items()} == {n: tuple(x.shape) for n, x in state.items()}
  given = {n: torch.from_numpy(x.copy()) for n, x in stored.items()}
  peft.set_peft_model_state_dict(theirs, given)
  ours, theirs_inputs, _, _ = seq2seq_pairs.examples(kind)
  with torch.no_grad():
    want = theirs(**theirs_inputs).logits
  got = seq2seq_pairs.logits(lora.with_adapters(base, adapters), ours)
  assert parity.error(got, want) < parity.FORWARD
  merged = jax.jit(lora.merge_adapters)(base, adapters)
  assert parity.error(seq2seq_pairs.logits(merged, ours), want) < parity.FORWARD


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_training_outputs_are_those_of_the_base(dtype):
  """B is 0, so outputs equal the base's, bit for bit."""
  compute, tokens_BT = layers.ComputeConfig(dtype=dtype), parity.tokens()
  base = random_base()
  joined = lora.with_adapters(base, init(base, LoraOptions(rank=2), jax.random.key(1)))
  np.testing.assert_array_equal(
    parity.plain_logits(joined, tokens_BT, compute), parity.plain_logits(base, tokens_BT, compute)
  )


def test_a_is_initialised_like_peft():
  """A is uniform between -1/sqrt(inputs) and 1/sqrt(inputs), as in torch's Linear."""
  base = random_base()
  adapters = init(base, LoraOptions(rank=32, targets=("o_proj", "down_proj")), jax.random.key(1))
  assert sorted(adapters) == ["layers.down", "layers.o"]
  for path, inputs in {"layers.o": 32, "layers.down": 64}.items():
    a, b = np.asarray(adapters[path].a[...]), np.asarray(adapters[path].b[...])
    module = torch.nn.Linear(inputs, 32, bias=False)
    torch.nn.init.kaiming_uniform_(module.weight, a=5**0.5)  # what peft's LoraLayer does
    bound = float(module.weight.detach().abs().max())
    assert np.abs(a).max() == pytest.approx(bound, rel=0.01)
    assert np.std(a) == pytest.approx(float(module.weight.detach().std()), rel=0.05)
    assert len(np.unique(a)) > a.size * 0.99  # layers are different
    assert not b.any()


def test_merging_matches_the_dense_formula():
  base = random_base()
  adapters = random_adapters(base, LoraOptions(rank=3, alpha=5.0, targets=("q_proj", "o_proj")))
  merge = jax.jit(lora.merge_adapters)
  whole = merge(base, adapters)
  f = lambda v: np.float64(v[...])
  pair = adapters["layers.q"]
  q = f(base.layers.q) + 5 / 3 * np.einsum("LDr,LrHh->LDHh", f(pair.a), f(pair.b))
  np.testing.assert_allclose(whole.layers.q[...], q, atol=1e-6)
  pair = adapters["layers.o"]
  o = f(base.layers.o) + 5 / 3 * np.einsum("LHhr,LrD->LHhD", f(pair.a), f(pair.b))
  np.testing.assert_allclose(whole.layers.o[...], o, atol=1e-6)
  for (path, v), (_, was) in zip(
    params.named_params(whole), params.named_params(base), strict=True
  ):
    assert v.get_metadata() == was.get_metadata()
    if path not in adapters:
      np.testing.assert_array_equal(v[...], was[...])
  half = params.map_params(lambda v: v.replace(v[...].astype(jnp.bfloat16)), base)
  assert {x.dtype for x in jax.tree.leaves(merge(half, adapters))} == {jnp.dtype("bfloat16")}


def steps(mesh_shape=(1, 1, 1), spec=LoraOptions(rank=4), **changes):  # noqa: B008
  """Returns (adapters, base before, base after, metrics) for three steps."""
  step = training_steps.make_step(trainable=Lora(options=spec), **changes)
  mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
  make = lambda key: llama.Model(llama.TINY, key)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(make, jax.random.key(0))
    where = sharding.shardings(shapes, mesh, step.student.rules)
    base = jax.jit(make, out_shardings=where)(jax.random.key(0))
    before = jax.device_get(base)
    begin = lambda key: step.init(lora.init(shapes, spec, key))
    where = sharding.shardings(jax.eval_shape(begin, jax.random.key(0)), mesh, step.student.rules)
    state = jax.jit(begin, out_shardings=where)(jax.random.key(7))
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    rows = []
    for n in range(3):
      batch = jax.device_put(training_steps.make_batch(n), sharding.batch_sharding(mesh))
      state, metrics = step_fn(state, batch, {}, base)
      rows.append({k: float(v) for k, v in metrics.items()})
  return jax.device_get(state.params), before, jax.device_get(base), rows


@pytest.fixture(scope="module")
def reference():
  return steps()


def test_only_adapters_change(reference):
  adapters, before, after, _ = reference
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert all(np.abs(p.b[...]).max() > 0 for p in adapters.values())


def test_mesh_does_not_change_training(reference):
  adapters, _, _, rows = steps((1, 2, 2))
  for row, want in zip(rows, reference[3], strict=True):
    for name in want:
      assert row[name] == pytest.approx(want[name], rel=1e-5), name
  for got, want in zip(jax.tree.leaves(adapters), jax.tree.leaves(reference[0]), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)  # 1% of one of Adam's first updates


def test_adapters_are_sharded_like_their_weight():
  base = jax.eval_shape(lambda: llama.Model(llama.TINY, jax.random.key(0)))
  adapters = lora.init(base, LoraOptions(rank=4, targets=("q_proj",)), jax.random.key(0))
  where = sharding.shardings(adapters, sharding.make_mesh(1, 2, 2), sharding.Rules())
  assert where["layers.q"].a.get_value().spec == jax.P(None, ("fsdp", "context"), None)
  assert where["layers.q"].b.get_value().spec == jax.P(None, None, "tensor", None)


def test_neither_microbatches_nor_remat_change_training(reference):
  rows = steps(accumulate=4, student=layers.ComputeConfig(remat="dots"))[3]
  for name in ("loss", "grad_norm", "soft", "hard"):
    assert rows[-1][name] == pytest.approx(reference[3][-1][name], rel=1e-5), name


def test_qkv_includes_the_adapters():
  base = random_base()
  adapters = random_adapters(base, LoraOptions(rank=2))
  inputs = parity.plain_inputs(parity.tokens())
  x_BTD = jax.random.normal(jax.random.key(1), (*inputs.tokens_BT.shape, 32))
  of = lambda model: model.qkv(1, x_BTD, inputs, layers.ComputeConfig())
  all_three = jax.jit(
    lambda base, a: [
      of(m) for m in (lora.with_adapters(base, a), lora.merge_adapters(base, a), base)
    ]
  )
  for a, b, was in zip(*all_three(base, adapters), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(a - was).max() > 0.1


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_no_second_copy_of_the_model_is_kept(remat):
  """Among the arrays kept for the backward pass, only the base's weights have a stack's shape."""
  base = random_base()
  adapters, compute = (
    random_adapters(base, LoraOptions(rank=2)),
    layers.ComputeConfig(remat=remat),
  )
  inputs = parity.plain_inputs(parity.tokens())
  hidden = lambda a: lora.with_adapters(base, a)(inputs, compute).hidden_BTD
  _, pull = jax.jit(lambda a: jax.vjp(hidden, a))(adapters)
  weights = {path: np.asarray(v[...]) for path, v in params.named_params(base) if path in adapters}
  shapes = {w.shape for w in weights.values()}
  kept = [np.asarray(x) for x in jax.tree.leaves(pull) if x.shape in shapes]
  assert all(any(np.array_equal(x, w) for w in weights.values()) for x in kept)


@pytest.mark.parametrize("family", [qwen3, deepseek_v3])
@pytest.mark.parametrize("target", ["gate_proj", "mlp.gate", "experts.{experts}.down_proj"])
def test_adapters_of_experts_are_refused(family, target):
  shape = family.CONFIGS["tiny-moe" if family is qwen3 else "tiny"]
  model = jax.eval_shape(lambda: family.Model(shape, jax.random.key(0)))
  message = f"targets is '{target}'; expected modules among .*o_proj.*, because layers of experts"
  with pytest.raises(InputError, match=message):
    lora.targets(model, LoraOptions(rank=2, targets=("o_proj", target)))
