"""The store: written, resumed, extended, read by us, by tfds and by grain; and its faults."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_store import N, T, V, manifest, record, sequence

from distill_jax.errors import InputError
from distill_jax.records import store, tf_example
from distill_jax.records.manifest import NAME, shard_name


def same(got, i):
  want = sequence(i)
  np.testing.assert_array_equal(got["tokens_T"], want["tokens_T"])
  dense = np.zeros((T, V))
  np.add.at(dense, (np.arange(T)[:, None], got["ids_TK"]), got["weight_TK"])
  ref = np.zeros((T, V))
  np.add.at(ref, (np.arange(T)[:, None], want["ids_TN"]), want["mask_T"][:, None] / N)
  np.testing.assert_allclose(dense, ref, atol=1e-6)


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "s"
  record(folder)
  return folder


@pytest.fixture
def copy(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "s")
  return tmp_path / "s"


# ---------------------------------------------------------------- reading


def test_a_record_costs_the_same_however_many_shards_there_are(whole, monkeypatch):
  """What a record asks of the manifest (its tag and spec) is worked out once a store."""
  s = store.open_store(whole)
  s[0]
  monkeypatch.setattr(store.Manifest, "identity", property(lambda m: pytest.fail("asked again")))
  for i in range(len(s)):
    same(s[i], i)


def test_read(whole):
  s = store.open_store(whole, {"tokenizer": "tok", "vocab_size": V, "teacher": "abc"})
  assert len(s) == 10
  for i in (0, 2, 3, 9):
    same(s[i], i)
  with pytest.raises(IndexError):
    s[10]
  seen = []
  s.verify(lambda done, total: seen.append((done, total)))
  assert seen == [(i + 1, 10) for i in range(10)]
  m = s.manifest
  assert [x.name for x in m.shards] == [shard_name(i) for i in range(4)]
  assert sum(x.tokens for x in m.shards) == sum(x.targets for x in m.shards) == 10 * (T - 4)


def test_pickle_and_threads(whole):
  s = pickle.loads(pickle.dumps(store.open_store(whole)))
  errors = []

  def work(k):
    try:
      for i in range(k, 50):
        same(s[i * 7 % 10], i * 7 % 10)
    except AssertionError as e:
      errors.append(e)

  threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert not errors


def test_tfds_reads_it_without_tensorflow(whole):
  code = f"""
    import sys
    import tensorflow_datasets as tfds
    from distill_jax.records import tf_example, manifest
    builder = tfds.builder_from_directory({str(whole)!r})
    source = builder.as_data_source(split="records")
    m = manifest.load({str(whole)!r})
    seqs = [tf_example.decode(i, source[i], m) for i in range(len(source))]
    assert len(seqs) == 10
    assert "float16" in builder.info.features["scalars"].doc.desc
    assert "tensorflow" not in sys.modules
    print(int(seqs[9]["tokens_T"].sum()))
  """
  out = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
  )
  assert int(out.stdout.split()[-1]) == sequence(9)["tokens_T"].sum()


def test_grain_reads_it(whole):
  import grain.python as grain

  m = store.open_store(whole).manifest
  source = grain.ArrayRecordDataSource([str(whole / s.name) for s in m.shards])
  assert len(source) == 10
  same(tf_example.decode(7, tf_example.parse(source[7]), m), 7)
  data = grain.MapDataset.source(store.open_store(whole)).shuffle(seed=1).batch(2)
  assert data[0]["ids_TK"].shape == (2, T, N)


@pytest.mark.parametrize(
  "change",
  [
    {"kind": "text", "n": 0},
    {"kind": "topk", "missing_mass": "tail_bucket"},
    {"logp": True},
    {"taps": store.Taps((0, 1), 8, 3)},
    {"entropy": False},
  ],
  ids=str,
)
def test_every_kind(tmp_path, change):
  m = manifest(2, **change)

  def seq(i):
    rng = np.random.default_rng(i)
    s = sequence(i)
    s["ids_TN"] = np.sort(rng.random((T, V)).argsort(1)[:, :N], 1)
    s["logp_TN"] = -rng.random((T, N)) - 1
    s["taps_PTD"] = rng.integers(-127, 128, (2, T, 8)).astype(np.int8)
    s["taps_scale_PT"] = rng.random((2, T)).astype(np.float32)
    return s

  with store.Writer(tmp_path, m) as w:
    for r in w.missing():
      w.write_shard(r, map(seq, r))
    w.complete()
  s = store.open_store(tmp_path)
  s.verify()
  got, want = s[1], seq(1)
  assert ("ids_TK" in got) == (m.kind != "text")
  if m.spec.has_logp:
    keep = want["mask_T"]
    np.testing.assert_allclose(got["logp_TK"][keep], want["logp_TN"][keep], atol=2e-3)
  if m.taps:
    keep = want["segments_T"] > 0
    np.testing.assert_array_equal(got["taps_PTD"][:, keep], want["taps_PTD"][:, keep])
  assert ("entropy_T" in got) == (m.kind != "text" and m.entropy)


def test_labels_of_a_task(tmp_path):
  """They are no tokens, and have no segments."""

  def example(i):
    row = sequence(i)
    row["labels_T"] = row.pop("tokens_T")
    del row["segments_T"]
    return row

  m = manifest(2, tokenizer="", labels=True, format_version=2)
  with store.Writer(tmp_path, m) as w:
    w.write_shard(range(2), map(example, range(2)))
    done = w.complete()
  assert done.shards[0].tokens == 2 * T
  read = store.open_store(tmp_path)
  read.verify()
  assert read.manifest == done
  np.testing.assert_array_equal(read[1]["labels_T"], sequence(1)["tokens_T"])
  np.testing.assert_array_equal(read[1]["mask_T"], sequence(1)["mask_T"])
  assert not {"tokens_T", "segments_T"} & set(read[1])


def test_format_1_of_text_and_of_a_task_is_read(tmp_path):
  """Format 1 has the labels of a task as tokens, and no tokenizer is how to tell."""
  text, task = tmp_path / "text", tmp_path / "task"
  record(text)
  record(task, manifest(tokenizer=""))
  for folder in (text, task):
    fields = json.loads((folder / NAME).read_text())
    assert fields["format_version"] == 1
    assert "labels" not in fields
  same(store.open_store(text)[4], 4)
  read = store.open_store(task)
  read.verify()
  assert read.manifest.labels
  np.testing.assert_array_equal(read[4]["labels_T"], sequence(4)["tokens_T"])
  np.testing.assert_array_equal(read[4]["mask_T"], sequence(4)["mask_T"])
  assert not {"tokens_T", "segments_T"} & set(read[4])
  with pytest.raises(InputError, match="of format 1 and this run writes format 2"):
    record(task, manifest(tokenizer="", labels=True, format_version=2))


def test_taps_are_of_a_kind_that_the_file_calls_of(tmp_path):
  m = manifest(2, taps=store.Taps((1,), 8, None, "qkv"))
  m.save(tmp_path)
  assert json.loads((tmp_path / NAME).read_text())["taps"]["of"] == "qkv"
  assert store.manifest_lib.load(tmp_path) == m


# ---------------------------------------------------------------- writing


def test_processes_give_the_same_bytes_as_one(whole, tmp_path):
  for index in (2, 0, 1):
    with store.Writer(tmp_path, manifest(), index, 3) as w:
      for r in w.missing():
        w.write_shard(r, map(sequence, r))
      done = w.complete()
    assert (done is not None) == (index == 1)
  assert contents(tmp_path) == contents(whole)


def test_resuming_redoes_only_what_is_missing(whole, tmp_path):
  assert record(tmp_path, shards=2) == [range(3), range(3, 6)]
  before = (tmp_path / shard_name(0)).stat().st_mtime_ns
  with pytest.raises(InputError, match="0 of 4 shards"):
    store.open_store(tmp_path)
  assert record(tmp_path) == [range(6, 9), range(9, 10)]
  assert (tmp_path / shard_name(0)).stat().st_mtime_ns == before
  assert contents(tmp_path) == contents(whole)
  assert record(tmp_path) == []
  assert contents(tmp_path) == contents(whole)


def test_a_damaged_shard_is_deleted_and_redone_alone(whole, copy):
  (copy / shard_name(1)).unlink()
  (copy / shard_name(3)).write_bytes(b"cut")
  assert record(copy) == [range(3, 6), range(9, 10)]
  assert contents(copy) == contents(whole)


def test_extending_rewrites_nothing(copy):
  before = contents(copy)
  assert record(copy, manifest(17)) == [range(10, 13), range(13, 16), range(16, 17)]
  after = contents(copy)
  assert all(after[n] == b for n, b in before.items() if n.startswith("records-"))
  s = store.open_store(copy)
  assert len(s) == 17
  for i in (9, 10, 16):
    same(s[i], i)
  import tensorflow_datasets as tfds

  source = tfds.builder_from_directory(str(copy)).as_data_source(split="records")
  assert len(source) == 17
  same(tf_example.decode(16, source[16], s.manifest), 16)
  with pytest.raises(InputError, match="holds 17 sequences and this run wants 10"):
    record(copy)


KILL = """
  import os, signal, sys
  sys.path[:0] = [{tests!r}, {root!r}]
  from pathlib import Path
  import tiny_store
  from distill_jax.runtime import atomic_io
  from distill_jax.records import writer
  countdown = {at}
  def maybe_die(fn):
    def wrapped(*a, **k):
      global countdown
      countdown -= 1
      if countdown < 0:
        os.kill(os.getpid(), signal.SIGKILL)
      return fn(*a, **k)
    return wrapped
  # Every step at which the folder changes.
  writer.tf_example.encode = maybe_die(writer.tf_example.encode)
  writer.digest = maybe_die(writer.digest)
  Path.replace = maybe_die(Path.replace)
  Path.unlink = maybe_die(Path.unlink)
  atomic_io.fsync_dir = maybe_die(atomic_io.fsync_dir)
  tiny_store.record({folder!r})
"""


@pytest.mark.parametrize("at", [0, 1, 2, 4, 7, 8, 9, 10, 11, 12, 20, 30, 36, 39, 41])
def test_kill_and_resume(whole, tmp_path, at):
  tests = Path(__file__).parents[1]
  code = KILL.format(at=at, folder=str(tmp_path), tests=str(tests), root=str(tests.parent))
  died = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
  assert died.returncode == -signal.SIGKILL
  finished = list(tmp_path.glob("*.array_record.json"))
  stamps = {p: p.with_suffix("").stat().st_mtime_ns for p in finished}
  todo = record(tmp_path)
  assert len(todo) == 4 - len(finished)
  assert all(p.with_suffix("").stat().st_mtime_ns == s for p, s in stamps.items())
  assert contents(tmp_path) == contents(whole)
  assert not list(tmp_path.glob(".writing-*"))
  store.open_store(tmp_path).verify()


# ---------------------------------------------------------------- faults


def refused(folder, *words, expect=None, read=False):
  with pytest.raises(InputError) as e:
    s = store.open_store(folder, expect)
    if read:
      for i in range(len(s)):
        s[i]
  for word in words:
    assert word in str(e.value)


def test_flipped_byte_anywhere_in_the_data(copy):
  path = copy / shard_name(1)
  data = bytearray(path.read_bytes())
  used = len(bytes(data).rstrip(b"\0"))
  found = 0
  for at in range(100, used, used // 12):
    bad = bytearray(data)
    bad[at] ^= 0x10
    path.write_bytes(bad)
    with pytest.raises(InputError, match=path.name):
      store.open_store(copy).verify()
    found += 1
    try:  # a read finds it, or the byte was not part of a record
      s = store.open_store(copy)
      for i in range(3, 6):
        same(s[i], i)
    except InputError as e:
      assert path.name in str(e)  # noqa: PT017
  assert found > 10


def test_records_of_one_label_are_a_few_dozen_bytes(tmp_path):
  """Many share a chunk; each is still read by itself, and one bad byte is still seen."""
  rng = np.random.default_rng(0)
  labels, logits = rng.integers(0, 10, 3000), rng.normal(size=(3000, 10)).astype(np.float32)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  def one(i):
    order = np.argsort(-logp[i]).astype(np.int32)
    return {
      "tokens_T": labels[i : i + 1].astype(np.int32),
      "segments_T": np.ones(1, np.int32),
      "mask_T": np.ones(1, bool),
      "ids_TN": order[None],
      "logp_TN": logp[i][order][None],
      "argmax_T": order[:1],
      "label_logp_T": logp[i, labels[i : i + 1]],
      "entropy_T": -np.sum(np.exp(logp[i]) * logp[i], keepdims=True),
    }

  kind = {"kind": "topk", "n": 10, "vocab_size": 10, "seq_len": 1, "missing_mass": "renormalise"}
  about = manifest(3000, logp=True, sequences_per_shard=3000, **kind)
  with store.Writer(tmp_path, about) as w:
    w.write_shard(range(3000), map(one, range(3000)))
    done = w.complete()
  assert done.shards[0].bytes < 100 * 3000  # 20 of them the log-probabilities, of random logits
  read = store.open_store(tmp_path)
  for i in rng.permutation(3000)[:100]:
    got = read[int(i)]
    assert got["tokens_T"] == labels[i]
    # float16 below 8 is to 2^-9.
    np.testing.assert_allclose(got["logp_TK"][0], logp[i][got["ids_TK"][0]], atol=2e-3)
  path = tmp_path / shard_name(0)
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 1
  path.write_bytes(data)
  refused(tmp_path, path.name, read=True)


def test_truncated_empty_and_missing_shards(copy):
  path = copy / shard_name(2)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  refused(copy, path.name, f"{len(data) // 2} bytes", str(len(data)))
  path.write_bytes(b"")
  refused(copy, path.name, "0 bytes")
  path.write_bytes(bytes(len(data)))
  refused(copy, path.name)
  path.unlink()
  refused(copy, path.name, "missing")


def test_foreign_shard_of_the_right_name(copy, tmp_path):
  record(tmp_path / "other", manifest(corpus="another"))
  shutil.copy(tmp_path / "other" / shard_name(1), copy / shard_name(1))
  refused(copy, shard_name(1), "of store", read=True)
  with pytest.raises(InputError, match="digest"):
    store.open_store(copy).verify()
  shutil.copy(copy / shard_name(0), copy / shard_name(1))  # one of this store, elsewhere
  refused(copy, shard_name(1), "record 0", "record 3", read=True)


@pytest.mark.parametrize(
  ("expect", "words"),
  [
    ({"tokenizer": "other"}, ("tokenizer='tok'", "'other'")),
    ({"vocab_size": 7}, (f"vocab_size={V}", "7")),
    ({"teacher": "xyz"}, ("'abc'", "'xyz'")),
    ({"nonsense": 1}, ("nonsense",)),
  ],
)
def test_another_tokenizer_vocabulary_or_teacher(whole, expect, words):
  refused(whole, *words, expect=expect)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"tokenizer": "x"}, "tokenizer='tok' and this run has tokenizer='x'"),
    ({"n": 7}, f"n={N} and this run has n=7"),
    ({"teacher": {"name": "t", "config": {"layers": 2}, "digest": "q"}}, "teacher.digest='abc'"),
  ],
)
def test_another_recording_in_the_folder(copy, change, words):
  before = contents(copy)
  with pytest.raises(InputError, match=words):
    record(copy, manifest(**change))
  assert contents(copy) == before


def test_manifests_that_are_none(copy, tmp_path):
  refused(tmp_path / "nowhere", "holds no manifest")
  text = (copy / NAME).read_text()
  for bad, word in [
    (text[: len(text) // 2], "cannot be read"),
    ("[]", "format None"),
    (text.replace('"format_version": 1', '"format_version": 99'), "format 99"),
    (text.replace('"corpus"', '"corpse"'), "corpse"),
  ]:
    (copy / NAME).write_text(bad)
    refused(copy, NAME, word)
    with pytest.raises(InputError, match=NAME):
      record(copy)


def test_full_disk(whole, tmp_path):
  """A limit on file size stands in for a full disk: the same error, from the same calls."""
  record(tmp_path, shards=1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  for limit in (1000, 70_000):  # in the first block; while the footer is written
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
      with pytest.raises(InputError, match=rf"{shard_name(1)} cannot be written .*too large"):
        record(tmp_path)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not (tmp_path / shard_name(1)).exists()
  assert len(record(tmp_path)) == 3
  assert contents(tmp_path) == contents(whole)


def test_two_writers_on_one_range(tmp_path):
  with store.Writer(tmp_path, manifest()) as first:
    with pytest.raises(InputError, match=f"being written by process {os.getpid()}"):
      store.Writer(tmp_path, manifest())
    # Another process count is another lock: found when the shard is finished.
    with store.Writer(tmp_path, manifest(), 0, 2) as second:
      r = first.missing()[0]
      first.write_shard(r, map(sequence, r))
      before = contents(tmp_path)
      second.write_shard(r, map(sequence, r))  # the same bytes: harmless
      assert contents(tmp_path) == before
      with pytest.raises(InputError, match="finished by another writer"):
        second.write_shard(r, (sequence(i + 1) for i in r))
      assert contents(tmp_path) == before
  assert len(record(tmp_path)) == 3


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("mine")
  for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/records")):
    with pytest.raises(InputError, match="cannot be written"):
      record(folder)
  assert (tmp_path / "file").read_text() == "mine"


def test_read_only_mount(tmp_path):
  """Root ignores mode bits, so a read-only mount in a private namespace."""
  script = f"mount -t tmpfs -o ro none {tmp_path} && exec {sys.executable} -c "
  tests = Path(__file__).parents[1]
  code = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n"
  code += f"import tiny_store\ntiny_store.record({str(tmp_path / 's')!r})"
  if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
    pytest.skip("no private mounts here")
  out = subprocess.run(
    ["unshare", "-m", "sh", "-c", script + '"$0"', code], capture_output=True, text=True
  )
  if "mount" in out.stderr and "denied" in out.stderr:
    pytest.skip("no mounts here")
  assert out.returncode == 1
  assert "Read-only file system" in out.stderr.strip().splitlines()[-1]


def test_wrong_sequences(tmp_path):
  with store.Writer(tmp_path, manifest()) as w:
    r = w.missing()[0]
    with pytest.raises(InputError, match="given 2 sequences, not 3"):
      w.write_shard(r, map(sequence, range(2)))
    with pytest.raises(InputError, match="more than 3"):
      w.write_shard(r, map(sequence, range(4)))
    with pytest.raises(InputError, match="no shard"):
      w.write_shard(range(1, 4), map(sequence, range(3)))
    short = {k: v[:5] for k, v in sequence(0).items()}
    with pytest.raises(InputError, match="5 tokens, not 32"):
      w.write_shard(r, [short])
    assert w.missing()[0] == r


def test_manifest_fields():
  for change, word in [
    ({"kind": "topk"}, "tail_bucket"),
    ({"missing_mass": "renormalise"}, "none"),
    ({"kind": "topk", "missing_mass": "renormalise", "temperature": 2.0}, "temperature"),
    ({"kind": "dense", "missing_mass": "renormalise"}, f"n is {N} for kind 'dense' of {V}"),
    ({"kind": "dense", "n": V}, "expected renormalise"),
    ({"kind": "dense", "n": V, "missing_mass": "renormalise", "temperature": 2.0}, "expected 1"),
    ({"extents": ()}, "empty corpus"),
  ]:
    with pytest.raises(InputError, match=word):
      manifest(**change)
  assert json.loads(json.dumps(manifest().identity)) == manifest().identity
