"""Log-likelihoods equal those of transformers, for all batches, lengths and meshes."""

import jax
import numpy as np
import parity
import pytest
import tiny
import torch

from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.evals import likelihood
from distill_jax.evals.likelihood import Pair, Scorer, make_pair, padded_len
from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.models import loading
from distill_jax.nn import layers, sharding

LONGEST = 80


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns a random model of transformers, its folder, and a byte tokenizer."""
  folder = tmp_path_factory.mktemp("likelihood")
  torch_model = parity.torch_model("llama", vocab_size=260, max_position_embeddings=LONGEST)
  torch_model.save_pretrained(folder)
  return torch_model, folder, load_tokenizer(tiny.write_tokenizer(folder / "tokenizer.json"))


def scorer(models, batch_size=4, mesh=None):
  _, folder, tokenizer = models
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  opened = open_model(str(folder))
  compute = layers.ComputeConfig()
  built = loading.LoadedModel(
    load.load_model(opened, mesh, compute), opened.config, compute, opened
  )
  return Scorer(built, mesh, tokenizer, batch_size, chunk=8)


def reference(model, of, vocab_size):
  """Returns transformers' log-likelihood of a pair, and True if greedy decoding gives it."""
  ids = [*of.given, *of.scored]
  with torch.no_grad():
    z = model(torch.tensor([ids])).logits[0, :, :vocab_size].double()
  logp = torch.log_softmax(z, -1)[len(of.given) - 1 : len(ids) - 1]
  scored = torch.tensor(of.scored)
  total = logp[torch.arange(len(scored)), scored].sum()
  return float(total), bool((logp.argmax(-1) == scored).all())


@pytest.fixture(scope="module")
def pairs(models):
  """Returns pairs of all lengths, up to the maximum, and two that greedy decoding generates."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(0, 256, n).tolist()
  out = [
    Pair(draw(a), draw(b))
    for a, b in (
      (1, 1),
      (1, 40),
      (30, 3),
      (47, 2),
      (LONGEST, 1),
      (5, LONGEST - 4),
      (33, 31),
      (2, 2),
      (20, 9),
    )
  ]
  for given in draw(5), draw(40):
    ids = list(given)
    for _ in range(4):
      with torch.no_grad():
        ids.append(int(models[0](torch.tensor([ids])).logits[0, -1, :256].argmax()))
    out.append(Pair(given, ids[len(given) :]))
  return out


def test_scores_equal_those_of_transformers(models, pairs):
  got = scorer(models)(pairs)
  for pair, ours in zip(pairs, got, strict=True):
    want, greedy = reference(models[0], pair, 256)
    assert ours.logp == pytest.approx(want, rel=2e-5, abs=2e-5) and ours.greedy == greedy
  assert [s.greedy for s in got][-2:] == [True, True] and not all(s.greedy for s in got)


def test_scores_do_not_depend_on_batch_and_mesh(models, pairs):
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2)
  some = [pairs[i] for i in (0, 2, 7, 8, 9)]  # these have one length with padding
  alone = [scored for of in (some[:2], some[2:]) for scored in scorer(models, 1)(of)]
  on_mesh = scorer(models, 4, mesh)(some[::-1])[::-1]
  for a, b in zip(alone, on_mesh, strict=True):
    assert a.logp == pytest.approx(b.logp, rel=1e-5, abs=1e-5) and a.greedy == b.greedy


def test_few_padded_lengths_are_compiled():
  lengths = {padded_len(n, 8192) for n in range(1, 8193)}
  assert len(lengths) < 20 and all(padded_len(n, 8192) >= n for n in range(1, 8193))
  assert all(padded_len(n, 8192) < 1.5 * n + 1 for n in range(32, 8193))
  assert padded_len(70, 80) == 80 and padded_len(1, 80) == 32 and padded_len(33, 80) == 48


def test_context_and_scored_tokens_of_a_pair(models, monkeypatch):
  tokenizer = models[2]
  spell = lambda of: (tokenizer.decode(of.given), tokenizer.decode(of.scored))
  assert spell(make_pair(tokenizer, "one", " two")) == ("one", " two")
  assert spell(make_pair(tokenizer, "one  ", "two")) == (
    "one",
    "  two",
  )
  with pytest.raises(InputError, match="no token that begins or ends a text"):
    make_pair(tokenizer, "", "two")
  with pytest.raises(InputError, match="adds no tokens to its context"):
    make_pair(tokenizer, "one", "")
  begin = tokenizer.encode("^")
  monkeypatch.setattr(tokenizer, "begin", begin)
  assert spell(make_pair(tokenizer, "one", " two")) == ("^one", " two")
  assert spell(make_pair(tokenizer, "^one", " two")) == ("^one", " two")  # not added twice
  assert spell(make_pair(tokenizer, "", " two")) == ("^", " two")
  assert likelihood.prefix(tokenizer) == begin


def test_invalid_batches_pairs_and_scores_are_errors(models):
  with pytest.raises(InputError, match="evaluate.batch_size is 3"):
    scorer(models, 3, sharding.make_mesh(data=2, fsdp=2))
  s = scorer(models)
  assert s.fits(Pair([1] * LONGEST, [1])) and not s.fits(Pair([1] * LONGEST, [1, 1]))
  s._score = lambda *_: {"logp": [np.nan], "greedy": [True]}
  with pytest.raises(FloatingPointError, match="log-probability of text 0 is nan"):
    s([Pair([1], [2])])


def test_other_weights_compile_nothing(models, pairs, caplog):
  """The student of the next evaluation in training."""
  scorer(models)(pairs[:4])
  other = scorer(models)
  with jax.log_compiles(), caplog.at_level("WARNING"):
    other(pairs[:4])
  assert [r.message for r in caplog.records if "compil" in r.message.lower()] == []
