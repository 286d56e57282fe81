"""The Llama family against transformers (torch, float32): every layer, logits, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import layers, params, sharding
from distill_jax.errors import InputError
from distill_jax.hub import declared, load
from distill_jax.models import llama
from distill_jax.types import Inputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = {
  "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
  "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
  "grouped heads": {},
  "tied": {"tie_word_embeddings": True},
  "one key/value head": {"num_key_value_heads": 1},
  "every head its own": {"num_key_value_heads": 4},
  # Positions run to 95, three times the original length: wavelengths of all three kinds.
  "llama 3 rope": {"rope_parameters": LLAMA3, "head_dim": 16},
  "wide heads": {"head_dim": 20, "rms_norm_eps": 1e-2},  # 4 * 20 is not the width, 48
}
B, T = 2, 96
# In units of the largest value: float32 keeps 6e-8, three layers in another order of
# addition lose 4e-6 here (seen, the worst of all cases), gradients 1e-5. Times three.
FORWARD, GRADIENT = 1.3e-5, 3e-5


def torch_model(seed: int = 0, **changes):
  """A random Llama of transformers whose parameters all matter: norms are not 1."""
  torch.manual_seed(seed)
  config = transformers.LlamaConfig(**{**BASE, **changes}, attn_implementation="eager")
  model = transformers.LlamaForCausalLM(config).float().eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
  return model


def ours_from(model, folder) -> llama.Model:
  """What transformers wrote, as we read it."""
  model.save_pretrained(folder)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return load.load(load.open_model(str(folder)), mesh, layers.Compute())


def plain_inputs(tokens_BT: np.ndarray) -> Inputs:
  B, T = tokens_BT.shape
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  return Inputs(*map(jnp.asarray, (tokens_BT, positions, np.ones((B, T), np.int32))))


def torch_outputs(model, tokens_BT: np.ndarray) -> tuple[list, np.ndarray, np.ndarray]:
  """(each layer's output, the final norm's, logits)."""
  kept: list[np.ndarray] = []
  keep = lambda m, i, out: kept.append((out if torch.is_tensor(out) else out[0]).detach().numpy())
  hooks = [m.register_forward_hook(keep) for m in [*model.model.layers, model.model.norm]]
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens_BT).long()).logits.numpy()
  for h in hooks:
    h.remove()
  return kept[:-1], kept[-1], logits


def tokens(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, BASE["vocab_size"], (B, T)).astype(np.int32)


def error(ours, theirs) -> float:
  """The largest difference, in units of the largest value."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_logits_are_transformers(case, tmp_path):
  theirs = torch_model(**CASES[case])
  ours, tokens_BT = ours_from(theirs, tmp_path), tokens()
  n = ours.config.num_hidden_layers
  out = jax.jit(lambda m, i: m(i, layers.Compute(), tuple(range(n))))(ours, plain_inputs(tokens_BT))
  want_layers, want_hidden, want_logits = torch_outputs(theirs, tokens_BT)
  errors = [error(out.taps_PBTD[i], w) for i, w in enumerate(want_layers)]
  errors += [error(out.hidden_BTD, want_hidden), error(out.hidden_BTD @ out.head_VD.T, want_logits)]
  assert max(errors) < FORWARD, errors


@pytest.mark.parametrize("case", ["grouped heads", "tied", "llama 3 rope"])
def test_gradients_are_transformers(case, tmp_path):
  theirs = torch_model(**CASES[case])
  ours, tokens_BT = ours_from(theirs, tmp_path), tokens()
  torch_tokens = torch.from_numpy(tokens_BT).long()
  theirs(torch_tokens, labels=torch_tokens).loss.backward()
  want = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

  def loss(model):
    out = model(plain_inputs(tokens_BT), layers.Compute())
    logp_BTV = jax.nn.log_softmax(out.hidden_BTD[:, :-1] @ out.head_VD.T)
    return -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], -1))

  got = {}
  for _, v in params.named_params(jax.jit(jax.grad(loss))(ours)):
    for name, at in declared.tensors(v):
      got[name] = declared.Layout(v).to_theirs(np.asarray(v[...])[at], np.dtype(np.float32))
  assert got.keys() == want.keys()
  worst = max((error(got[n], want[n]), n) for n in want)
  assert worst[0] < GRADIENT, worst


def test_the_rope_scaling_is_seen_at_these_positions(tmp_path):
  """Else the case above would pass without it."""
  ours, tokens_BT = ours_from(torch_model(**CASES["llama 3 rope"]), tmp_path), tokens()
  hidden = lambda c: _with_config(ours, c)(plain_inputs(tokens_BT), layers.Compute()).hidden_BTD
  plain = dataclasses.replace(ours.config, rope_scaling=None)
  assert error(hidden(plain), hidden(ours.config)) > 1000 * FORWARD


def _with_config(model: llama.Model, config: llama.Config) -> llama.Model:
  other = jax.tree.map(lambda x: x, model)
  other.config = config
  return other


def test_packed_documents_are_as_if_alone(tmp_path):
  ours, tokens_BT = ours_from(torch_model(), tmp_path), tokens()[:1]
  cut, run = 40, jax.jit(lambda i: ours(i, layers.Compute(), (0, 2)))
  segments = np.where(np.arange(T) < cut, 1, 2)[None].astype(np.int32)
  positions = np.where(np.arange(T) < cut, np.arange(T), np.arange(T) - cut)[None].astype(np.int32)
  packed = run(Inputs(*map(jnp.asarray, (tokens_BT, positions, segments))))
  for part in (slice(0, cut), slice(cut, T)):
    alone = run(plain_inputs(tokens_BT[:, part]))
    assert error(packed.hidden_BTD[:, part], alone.hidden_BTD) < FORWARD
    assert error(packed.taps_PBTD[:, :, part], alone.taps_PBTD) < FORWARD


def test_taps_come_in_the_order_asked_for(tmp_path):
  ours = ours_from(torch_model(), tmp_path)
  run = lambda taps: ours(plain_inputs(tokens()), layers.Compute(), taps).taps_PBTD
  np.testing.assert_array_equal(run((2, 0)), run((0, 2))[::-1])
  assert run(()) is None


@pytest.mark.parametrize(
  "key, value, word",
  [
    ("hidden_act", "gelu", "hidden_act"),
    ("attention_bias", True, "attention_bias"),
    ("mlp_bias", True, "mlp_bias"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "yarn"),
    ("num_key_value_heads", 3, "key/value heads"),
    ("hidden_size", 0, "hidden_size"),
    ("vocab_size", -1, "vocab_size"),
    ("num_hidden_layers", 2.5, "num_hidden_layers"),
    ("head_dim", 7, "head_dim"),
    ("rope_theta", float("nan"), "rope_theta"),
    ("rms_norm_eps", -1e-5, "rms_norm_eps"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings"),
    ("rope_scaling", LLAMA3 | {"factor": 0}, "factor"),
    ("rope_scaling", LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor"),
  ],
)
def test_a_config_that_cannot_be_computed_is_refused(key, value, word):
  with pytest.raises(InputError, match=word):
    llama.Config.from_hf({**llama.TINY.to_hf(), "rope_parameters": None, key: value})


@pytest.mark.parametrize("name", llama.CONFIGS)
def test_a_config_goes_through_config_json(name):
  config = llama.CONFIGS[name]
  assert llama.Config.from_hf(config.to_hf()) == config
  scaled = dataclasses.replace(config, rope_scaling=llama.RopeScaling(8.0, 1.0, 4.0, 32))
  assert llama.Config.from_hf(scaled.to_hf()) == scaled


def test_smollm2_has_its_published_size():
  build = lambda key: llama.Model(llama.CONFIGS["smollm2-135m"], key)
  assert params.count(jax.eval_shape(build, jax.random.key(0))) == 134_515_008
