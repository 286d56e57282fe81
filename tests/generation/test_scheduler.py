"""Cached decoding gives transformers' tokens and the uncached model's probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import slow
from decoding import (
  COMPUTE,
  DRAWN,
  GREEDY,
  MOE,
  NEW,
  SIZE,
  Numbers,
  copied,
  decode,
  engine_of,
  one_device,
  prompts,
  random_model,
  run,
)

from distill_jax import config
from distill_jax.generation.stops import Stops
from distill_jax.models import runs
from distill_jax.nn import fused_head, sharding
from distill_jax.nn.params import map_params
from distill_jax.records import sampler

transformers, torch = parity.transformers, parity.torch


FAST = ("llama", "gemma3", "deepseek_v3")


@pytest.mark.parametrize("kind", slow.all_but(FAST, parity.DECODERS))
def test_greedy_tokens_equal_those_of_transformers(kind, tmp_path):
  """Prompts have 1 to 20 tokens and are prefilled in chunks; rows are refilled; windows slide.

  The log-probabilities of the tokens are those of our model without a cache.
  """
  model_type, changes = parity.DECODERS[kind]
  theirs = parity.torch_model(model_type, **changes)
  ours = parity.ours_from(theirs, tmp_path)
  read = prompts(parity.BASE["vocab_size"])
  got = decode(ours, one_device(), GREEDY, read)
  whole = np.zeros((len(read), SIZE), np.int32)
  for n, ids in read.items():
    with torch.no_grad():
      want = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
      )[0, len(ids) :].tolist()
    assert got[n, 0].tokens == want
    assert got[n, 0].reason == "length"
    whole[n, : len(ids) + NEW] = [*ids, *want]
  out = jax.jit(lambda m, i: m(i, COMPUTE))(ours, parity.plain_inputs(whole))
  z_BTV = fused_head.soft_cap(fused_head.logits(out.hidden_BTD, out.head_VD), out.soft_cap)
  logp_BTV = np.asarray(jax.nn.log_softmax(z_BTV))
  for n, ids in read.items():
    at = np.arange(len(ids) - 1, len(ids) - 1 + NEW)
    np.testing.assert_allclose(got[n, 0].logps, logp_BTV[n, at, got[n, 0].tokens], atol=2e-4)


def test_tokens_do_not_depend_on_the_batch():
  """Neither the number of rows nor the number of prefilled prompts changes them."""
  model, read = random_model(), prompts(256)
  wanted = [(p, s) for p in read for s in range(2)]
  first, other = (
    {k: s.tokens for k, s in decode(model, one_device(), DRAWN, read, wanted, rows, fill).items()}
    for rows, fill in ((8, 2), (1, 1))
  )
  assert other == first
  assert first[4, 0] != first[4, 1]


def test_a_row_does_not_depend_on_other_rows():
  """Samples in another order or alone, e.g. after a resume, are equal bit for bit."""
  model, read = random_model("qwen3", **MOE), prompts(256)
  wanted = [(p, s) for p in read for s in range(2)]
  engine = engine_of(model, one_device(), DRAWN)
  first = run(engine, one_device(), read, wanted)
  for some in (wanted[::-1], [(3, 1)], wanted[2:7]):
    for key, s in run(engine, one_device(), read, some).items():
      assert (s.tokens, s.logps) == (first[key].tokens, first[key].logps)


@pytest.mark.parametrize("family", ["llama", slow.param("deepseek_v3")])
def test_sharded_rows_and_heads_equal_one_device(family):
  model, read = random_model(family), prompts(256, (3, 9, 14))
  records = config.RecordsOptions(n=15)
  one = decode(model, one_device(), DRAWN, read, rows=4, records=records)
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
  spread = jax.device_put(copied(model), sharding.shardings(model, mesh, COMPUTE.rules))
  four = decode(spread, mesh, DRAWN, read, rows=4, records=records)
  for key, s in one.items():
    assert four[key].tokens == s.tokens
    np.testing.assert_allclose(four[key].logps, s.logps, atol=1e-4)
    for name in ("entropy", "label_logp"):
      np.testing.assert_allclose(four[key].records[name], s.records[name], atol=1e-4)
    same = np.array(four[key].records["ids"]) == np.array(s.records["ids"])
    assert same.mean() > 0.99


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_records_equal_those_of_the_recorder(kind):
  """The recorder uses the model without a cache, with offsets of the same keys."""
  model, read = random_model(), prompts(256, (6, 11))
  c = config.RecordsOptions(kind=kind, n=15, temperature=1.5 if kind == "sampled" else 1.0)
  spec = sampler.SamplerSpec(c.n, kind, temperature=c.temperature)

  @jax.jit
  def recorded(model, inputs, labels_BT, u_BT):
    out = model(inputs, COMPUTE)
    return sampler.summarise(out.hidden_BTD, out.head_VD, labels_BT, u_BT, spec, chunk=16)

  for (p, number), s in decode(model, one_device(), DRAWN, read, records=c).items():
    ids = jnp.asarray([read[p] + s.tokens], jnp.int32)
    key = jax.random.fold_in(jax.random.fold_in(runs.keys(3)["records"], p), number)
    at = jnp.arange(ids.shape[1] - 1)
    u_BT = jax.vmap(lambda t, k=key: jax.random.uniform(jax.random.fold_in(k, t)))(at)[None]
    want = recorded(model, parity.plain_inputs(np.asarray(ids[:, :-1])), ids[:, 1:], u_BT)
    got = {name: np.array(x) for name, x in s.records.items()}
    assert got.keys() == want.keys()
    for name, x in want.items():
      x = np.asarray(x)[0, len(read[p]) - 1 :]
      if x.dtype == np.int32:
        assert (got[name] == x).mean() > 0.99, name
      else:
        np.testing.assert_allclose(got[name], x, atol=2e-4, err_msg=name)


def test_a_model_with_nan_weights_is_an_error():
  model = map_params(lambda v: v.replace(v[...] * jnp.nan), random_model())
  with pytest.raises(FloatingPointError, match="token 0 of prompt 0, sample 0 is not finite"):
    decode(model, one_device(), DRAWN, {0: [1, 2]})


def test_texts_end_at_stop_strings_eos_and_length():
  """Tokens that a call generates after the end of a text are dropped."""
  model, read, mesh = random_model(), prompts(256), one_device()
  engine = engine_of(model, mesh, GREEDY)
  free = run(engine, mesh, read)
  tokens = free[3, 0].tokens
  stop = Stops(Numbers(), (f"{tokens[4]} {tokens[5]}",))  # spans two tokens
  ended = run(engine, mesh, read, stops=stop)[3, 0]
  assert ended.reason == "stop" and len(ended.logps) == len(ended.tokens)
  assert ended.tokens == tokens[: len(ended.tokens)]
  long = prompts(256, (SIZE - 1,))
  assert len(run(engine, mesh, long)[0, 0].tokens) == 1
  at = tokens.index(tokens[5])
  ended = run(engine_of(model, mesh, GREEDY, eos=(tokens[5],)), mesh, read, eos=(tokens[5],))[3, 0]
  assert (ended.tokens, ended.reason) == (tokens[: at + 1], "eos")


def test_other_weights_compile_nothing(caplog):
  first, other = random_model(), map_params(lambda v: v.replace(v[...] * 0.9), random_model())
  read = prompts(first.config.vocab_size)
  mesh = one_device()
  before = decode(first, mesh, DRAWN, read)
  jax.block_until_ready(jax.tree.leaves(other))
  with jax.log_compiles(), caplog.at_level("WARNING"):
    after = decode(other, mesh, DRAWN, read)
  assert [r.message for r in caplog.records if "compil" in r.message.lower()] == []
  assert [s.tokens for s in before.values()] != [s.tokens for s in after.values()]
