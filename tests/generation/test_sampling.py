"""Sampling keeps the tokens that transformers keeps, and draws them with its probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.errors import InputError
from distill_jax.generation import sampling
from distill_jax.generation.sampling import Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {
  "temperature": Sampling(0.6),
  "top_k": Sampling(1.3, top_k=7),
  "top_p": Sampling(0.9, top_p=0.8),
  "narrow": Sampling(1.0, top_p=0.05),
  "min_p": Sampling(1.1, min_p=0.1),
  "all": Sampling(1.4, top_k=30, top_p=0.9, min_p=0.05),
}


def logits(rows: int = 6, vocab: int = 200) -> np.ndarray:
  rng = np.random.default_rng(0)
  return (2 * rng.standard_normal((rows, vocab))).astype(np.float32)


def theirs(z_BV: np.ndarray, settings: Sampling) -> np.ndarray:
  """Returns the probabilities after transformers' logits processors for these settings."""
  c = transformers.GenerationConfig(
    do_sample=True,
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    min_p=settings.min_p or None,
  )
  model = transformers.AutoModelForCausalLM.from_config(
    transformers.LlamaConfig(
      vocab_size=8,
      hidden_size=8,
      intermediate_size=8,
      num_hidden_layers=1,
      num_attention_heads=1,
    )
  )
  z = torch.tensor(z_BV)
  for processor in model._get_logits_processor(generation_config=c):
    z = processor(None, z)
  return torch.softmax(z.double(), -1).numpy()


def kept(z_BV: np.ndarray, settings: Sampling) -> np.ndarray:
  """Returns the tokens that `choose` may draw and accept, bool [B, V]."""
  e_BCV, drawn_BCV = sampling.warp(jnp.asarray(z_BV)[:, None], settings)
  if settings.top_p == 1:
    return np.isfinite(drawn_BCV[:, 0])
  ids = jnp.broadcast_to(jnp.arange(z_BV.shape[1])[None], z_BV.shape)
  e_BV, total_B1 = e_BCV[:, 0], jnp.sum(e_BCV, -1)
  one = lambda e_V, total, ids_V: jax.vmap(
    lambda i: sampling.in_nucleus(e_V[None, None], total[None], i[None, None], settings.top_p)[0, 0]
  )(ids_V)
  nucleus = np.array([one(*args) for args in zip(e_BV, total_B1, ids, strict=True)])
  return nucleus & np.isfinite(drawn_BCV[:, 0])


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_kept_tokens_equal_those_of_transformers(settings):
  z_BV = logits()
  want = theirs(z_BV, settings) > 0
  np.testing.assert_array_equal(kept(z_BV, settings), want)
  assert settings.top_k or settings.top_p < 1 or settings.min_p or want.all()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_tokens_are_drawn_with_transformers_probabilities(settings):
  z_BV, n = logits(1, 40), 20_000
  keys = jax.random.split(jax.random.key(0), n)
  got = jax.jit(lambda z, k: sampling.choose(z, k, settings))(
    jnp.asarray(np.repeat(z_BV, n, 0)), keys
  )
  p = theirs(z_BV, settings)[0]
  count = np.bincount(got, minlength=40)
  assert not count[p == 0].any()
  if (df := (p > 0).sum() - 1) == 0:
    return
  chi2 = (((count - n * p) ** 2)[p > 0] / (n * p[p > 0])).sum()
  assert chi2 < df + 4 * np.sqrt(2 * df) + 4  # 4 deviations


def test_greedy_takes_the_first_of_equal_logits_and_never_padding():
  z = np.array([[0, 3, 3, 1], [-np.inf, -5, -np.inf, -5]], np.float32)
  keys = jax.random.split(jax.random.key(0), 2)
  np.testing.assert_array_equal(sampling.choose(jnp.asarray(z), keys, Sampling(0.0)), [1, 1])
  drawn = [
    sampling.choose(jnp.asarray(z[1:]), jax.random.split(jax.random.key(i), 1), Sampling(5.0))[0]
    for i in range(30)
  ]
  assert set(map(int, drawn)) == {1, 3}


def test_a_row_of_nan_terminates():
  """Rejection sampling must stop; callers find that the log-probability is not finite."""
  z = jnp.asarray([[0.0, 1.0], [jnp.nan, jnp.nan], [-jnp.inf, -jnp.inf]])
  keys = jax.random.split(jax.random.key(0), 3)
  assert sampling.choose(z, keys, Sampling(1.0, top_p=0.9)).shape == (3,)


def test_a_row_depends_only_on_its_key():
  z, keys = jnp.asarray(logits()), jax.random.split(jax.random.key(1), 6)
  settings = Sampling(1.0, top_p=0.3)
  whole = sampling.choose(z, keys, settings)
  alone = [sampling.choose(z[i : i + 1], keys[i : i + 1], settings)[0] for i in range(6)]
  np.testing.assert_array_equal(whole, alone)


@pytest.mark.parametrize(
  "bad",
  [
    {"temperature": -1.0},
    {"top_p": 0.0},
    {"min_p": 2.0},
    {"top_k": -1},
    {"temperature": float("nan")},
  ],
)
def test_settings_out_of_range_are_errors(bad):
  with pytest.raises(InputError, match=next(iter(bad))):
    Sampling(**bad)
