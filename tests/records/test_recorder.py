"""Recorder: any JAX teacher without a config, and the same bytes as the command `record`."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_store import contents

import distill_jax as dj
from distill_jax import config
from distill_jax.commands import record
from distill_jax.errors import InputError
from distill_jax.models import llama, runs
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records import recording

B, T, D, V, ROWS, S = 4, 8, 16, 64, 14, 4
KINDS = {
  "sampled": {"kind": "sampled", "n": 7},
  "sampled with logp": {"kind": "sampled", "n": 7, "logp": True},
  "topk": {"kind": "topk", "n": 5},
  "nucleus": {"kind": "topk", "n": 9, "nucleus": 0.5, "missing_mass": "renormalise"},
  "at a temperature": {"kind": "sampled", "n": 7, "temperature": 2.0},
  "dense": {"kind": "dense"},
  "labels": {"kind": "labels"},
  "text": {"kind": "text"},
}


def corpus(rows=ROWS):
  rng = np.random.default_rng(0)
  segments = np.sort(rng.integers(0, 3, (rows, T)), 1)[:, ::-1]
  return rng.integers(0, V, (rows, T)), np.where(segments > 0, 3 - segments, 0)


HEAD = jnp.asarray(np.random.default_rng(1).normal(size=(V, D)), jnp.float32)
TABLE = jnp.asarray(np.random.default_rng(2).normal(size=(V, D)), jnp.float32)


def teacher(tokens):
  """Hidden states that depend on a token alone."""
  return TABLE[jnp.asarray(tokens)]


def settings(**changes):
  return {
    "vocab_size": V,
    "seq_len": T,
    "n": 7,
    "teacher": "a table",
    "tokens_per_shard": S * T,
    "chunk": 3,
  } | changes


def write(folder, rows=ROWS, size=B, start=0, form="hidden", **changes):
  tokens, segments = corpus(max(rows, ROWS))
  kind = changes.get("kind", "sampled")
  with dj.Recorder(folder, **settings(**changes)) as r:
    for i in range(start, rows, size):
      part = slice(i, min(i + size, rows))
      outputs = {"hidden": teacher(tokens[part]), "head": HEAD}
      if form == "logits":
        outputs = {"logits": outputs["hidden"] @ HEAD.T}
      r.add(tokens[part], segments[part], **({} if kind == "text" else outputs))
  return dj.open_store(folder)


def test_the_store_is_that_of_the_command_record_byte_for_byte(tmp_path):
  """The same model and text: every file is the same, but for locks."""
  c = tiny.tiny(tmp_path)
  c.teacher.source = ""
  resolved = config.resolve(c)
  (tmp_path / "ours").mkdir()
  record.run(resolved, tmp_path / "ours")

  model = jax.jit(lambda key: llama.Model(llama.TINY, key))(runs.keys(0)["teacher"])
  compute = ComputeConfig()
  run = jax.jit(lambda model, inputs: model(inputs, compute))
  (text,) = record.open_corpora(
    resolved, record.loading.open_source(resolved.teacher), tmp_path / "ours" / record.PACKED
  ).values()
  rows = text.rows
  with dj.Recorder(
    tmp_path / "theirs",
    vocab_size=text.classes,
    seq_len=tiny.SEQ_LEN,
    n=15,
    teacher={"name": "llama tiny", "digest": "random, seed 0"},
    tokenizer=text.tokenizer,
    tokens_per_shard=6 * tiny.SEQ_LEN,
    chunk=16,
  ) as r:
    for i in range(0, len(rows), 4):
      stack = lambda name: np.stack([row[name] for row in rows[i : i + 4]])  # noqa: B023
      tokens, segments = stack("tokens_T"), stack("segments_T")
      first = np.insert(segments[:, 1:] != segments[:, :-1], 0, True, axis=1)
      t = np.arange(tokens.shape[1])
      positions = t - np.maximum.accumulate(np.where(first, t, 0), axis=1)
      out = run(model, dj.Inputs(tokens, positions.astype(np.int32), segments))
      r.add(tokens, segments, stack("mask_T"), hidden=out.hidden_BTD, head=out.head_VD)
  ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
  assert ours.keys() == theirs.keys()
  assert json.loads(theirs["manifest.json"]) == json.loads(ours["manifest.json"])
  for name, data in ours.items():
    assert theirs[name] == data, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_as_the_sampler_gives_it(kind, tmp_path):
  store = write(tmp_path, **KINDS[kind])
  tokens, segments = corpus()
  assert len(store) == ROWS and [s.count for s in store.manifest.shards] == [4, 4, 4, 2]
  store.verify()
  np.testing.assert_array_equal([store[i]["tokens_T"] for i in range(ROWS)], tokens)
  np.testing.assert_array_equal([store[i]["segments_T"] for i in range(ROWS)], segments)
  if kind == "text":
    assert store.manifest.teacher == {}
    return
  temperature = KINDS[kind].get("temperature", 1.0)
  logits = np.float64(teacher(tokens) @ HEAD.T) / temperature
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for i in range(ROWS):
    row = store[i]
    mask = row["mask_T"]
    np.testing.assert_allclose(
      row["entropy_T"][mask], -(np.exp(logp) * logp).sum(-1)[i][mask], rtol=2e-3
    )
    if kind != "labels":
      np.testing.assert_array_equal(row["argmax_T"][mask], logp[i].argmax(-1)[mask])
    labels = np.append(tokens[i, 1:], 0)
    np.testing.assert_allclose(
      row["label_logp_T"][mask], logp[i][np.arange(T), labels][mask], rtol=2e-3, atol=1e-3
    )
    if "logp_TK" in row:
      want = np.take_along_axis(logp[i], row["ids_TK"], -1)
      used = mask[:, None] & (row["logp_TK"] > -np.inf)
      if "weight_TK" in row:
        used &= row["weight_TK"] > 0
      np.testing.assert_allclose(row["logp_TK"][used], want[used], rtol=2e-3, atol=1e-3)
    if "weight_TK" in row:
      p = np.take_along_axis(np.exp(logp[i]), row["ids_TK"], -1)
      assert np.abs(row["weight_TK"] - p)[mask][row["weight_TK"][mask] > 0].max() <= 1 / 7 + 1e-6


def test_logits_and_the_batch_size_do_not_change_the_records(tmp_path):
  want = write(tmp_path / "whole")
  for name, changes in {
    "logits": {"form": "logits"},
    "ones": {"size": 1},
    "odd": {"size": 5},
    "known": {"sequences": ROWS},
    "url": {},
  }.items():
    folder = f"file://{tmp_path / name}" if name == "url" else tmp_path / name
    got = write(folder, **changes)
    assert got.manifest.digest == want.manifest.digest, name
  assert contents(tmp_path / "known") == contents(tmp_path / "whole")


def test_it_resumes_where_it_was_stopped_and_calls_the_teacher_for_the_rest(tmp_path):
  want = write(tmp_path / "whole")
  tokens, segments = corpus()
  calls = []

  def run(folder, stop=None, **changes):
    with dj.Recorder(folder, **settings(**changes)) as r:
      for i in range(0, ROWS, B):
        if i == stop:
          raise KeyboardInterrupt
        part = slice(i, i + B)
        ask = lambda: calls.append(i) or teacher(tokens[part])  # noqa: B023
        r.add(tokens[part], segments[part], hidden=ask, head=HEAD)
      assert r.added == ROWS

  for name, changes in (("grows", {}), ("known", {"sequences": ROWS})):
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path / name, stop=12, **changes)
    # The last batch was still on the devices: it is computed again.
    assert calls == [0, 4, 8]
    calls.clear()
    run(tmp_path / name, **changes)
    assert calls == [8, 12]
    assert dj.open_store(tmp_path / name).manifest.digest == want.manifest.digest
    calls.clear()
    run(tmp_path / name, **changes)
    assert calls == []
    assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_more_rows_extend_a_store(tmp_path):
  write(tmp_path, rows=10)
  store = write(tmp_path, rows=ROWS)
  assert [s.count for s in store.manifest.shards] == [4, 4, 2, 4]
  want = write(tmp_path / "once", rows=ROWS)
  for i in range(ROWS):
    for name, x in want[i].items():
      np.testing.assert_array_equal(store[i][name], x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_records_on_a_mesh(kind, tmp_path):
  want = write(tmp_path / "one device", size=2)
  mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
  tokens, segments = corpus()
  with (
    jax.set_mesh(mesh),
    dj.Recorder(tmp_path / "mesh", **settings(batch_axes=("x",), vocab_axis="y")) as r,
  ):
    head = jax.device_put(np.asarray(HEAD), NamedSharding(mesh, P("y")))
    for i in range(0, ROWS, 4):
      hidden = np.asarray(TABLE)[tokens[i : i + 4]]
      if len(hidden) == 4:
        hidden = jax.device_put(hidden, NamedSharding(mesh, P("x")))
      r.add(tokens[i : i + 4], segments[i : i + 4], hidden=hidden, head=head)
  got = dj.open_store(tmp_path / "mesh")
  for i in range(ROWS):
    np.testing.assert_array_equal(got[i]["ids_TK"], want[i]["ids_TK"])
    np.testing.assert_array_equal(got[i]["weight_TK"], want[i]["weight_TK"])
    np.testing.assert_allclose(got[i]["entropy_T"], want[i]["entropy_T"], rtol=2e-3)


def test_a_mask_leaves_out_labels_that_do_not_exist(tmp_path):
  tokens, segments = corpus(B)
  with dj.Recorder(tmp_path, **settings()) as r:
    r.add(tokens, segments, np.ones((B, T), bool), hidden=teacher(tokens), head=HEAD)
  store = dj.open_store(tmp_path)
  for i in range(B):
    same = (segments[i, 1:] == segments[i, :-1]) & (segments[i, :-1] > 0)
    np.testing.assert_array_equal(store[i]["mask_T"], np.append(same, False))


def test_a_recorded_store_trains_the_fused_head(tmp_path):
  store = write(tmp_path)
  batch = next(iter(store.as_dataset("batch", batch_size=4)))
  loss, _ = dj.fused_loss({"soft": dj.losses.KD()}, teacher(batch.inputs.tokens_BT), HEAD, batch)
  assert abs(float(loss)) < 0.35  # the teacher against its own sample of 7 points


def test_it_needs_no_package_of_the_extra_train(tmp_path):
  code = f"""
    import sys

    class Refuse:
      def find_spec(self, name, path=None, target=None):
        if name in ("grain", "huggingface_hub", "orbax", "sentencepiece", "tokenizers"):
          raise ModuleNotFoundError(name, name=name)

    sys.meta_path.insert(0, Refuse())
    import numpy as np
    import distill_jax as dj

    with dj.Recorder({str(tmp_path)!r}, vocab_size=8, seq_len=4, n=3, teacher="uniform") as r:
      r.add(np.ones((2, 4), int), logits=np.zeros((2, 4, 8), np.float32))
    assert len(dj.open_store({str(tmp_path)!r})) == 2
  """
  command = [sys.executable, "-c", textwrap.dedent(code)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_more_tokens_than_the_vocabulary_has_are_refused(tmp_path):
  with pytest.raises(InputError, match=f"records.n is 65; expected at most {V}, the vocabulary"):
    dj.Recorder(tmp_path, **settings(kind="topk", n=V + 1))


def test_a_batch_larger_than_the_store_is_refused(tmp_path):
  """It had no elements, so that a loop over it ended at once."""
  store = write(tmp_path)
  for size in (0, ROWS + 1):
    with pytest.raises(InputError, match=f"batch_size is {size}; expected from 1 to {ROWS}"):
      store.as_dataset("batch", batch_size=size)
  assert len(store.as_dataset("batch", batch_size=ROWS + 1, epochs=2)) == 1


def test_what_is_refused(tmp_path):
  tokens, segments = corpus(B)
  hidden = teacher(tokens)
  with pytest.raises(InputError, match="teacher is ''; expected a name, or a dict"):
    dj.Recorder(tmp_path, **settings(teacher=""))
  with pytest.raises(InputError, match="kind is 'samples'; expected one of"):
    dj.Recorder(tmp_path, **settings(kind="samples"))
  with pytest.raises(InputError, match="tokenizer is ''; expected a tokenizer or its digest"):
    dj.Recorder(tmp_path, **settings(tokenizer=""))
  with pytest.raises(InputError, match="No rows were added"), dj.Recorder(tmp_path, **settings()):
    pass
  with dj.Recorder(tmp_path, **settings(sequences=B)) as r:
    with pytest.raises(InputError, match=r"\(4, 7\).*; expected arrays of one shape, \[B, 8\]"):
      r.add(tokens[:, 1:], hidden=hidden, head=HEAD)
    with pytest.raises(InputError, match="Recorder.add got hidden; expected hidden and head, or"):
      r.add(tokens, segments, hidden=hidden)
    with pytest.raises(InputError, match=r"hidden is \(4, 7, 16\); expected an array of shape"):
      r.add(tokens, segments, hidden=hidden[:, 1:], head=HEAD)
    r.add(tokens, segments, hidden=hidden, head=HEAD)
    with pytest.raises(InputError, match="sequences is 4; expected at least .* 8"):
      r.add(tokens, segments, hidden=hidden, head=HEAD)
  with (
    pytest.raises(InputError, match="was recorded from another corpus: sequence 3 differs"),
    dj.Recorder(tmp_path, **settings(sequences=B)) as r,
  ):
    changed = np.concatenate([tokens[:3], tokens[:1]])
    r.add(changed, segments, hidden=hidden, head=HEAD)
  with (
    pytest.raises(InputError, match="teacher"),
    dj.Recorder(tmp_path, **settings(teacher="another")) as r,
  ):
    r.add(tokens, segments, hidden=hidden, head=HEAD)
  with (
    pytest.raises(InputError, match="sequences is 20; expected the number of rows .* 4"),
    dj.Recorder(tmp_path / "short", **settings(sequences=20)) as r,
  ):
    r.add(tokens, segments, hidden=hidden, head=HEAD)


def test_a_teacher_that_is_not_finite_is_named(tmp_path):
  tokens, segments = corpus(B)
  with (
    pytest.raises(InputError, match="finite"),
    dj.Recorder(tmp_path, **settings()) as r,
  ):
    r.add(tokens, segments, hidden=teacher(tokens) * jnp.nan, head=HEAD)


def test_it_uses_the_key_of_the_command_record():
  assert (recording.sampling_key(3) == runs.keys(3)["records"]).all()
