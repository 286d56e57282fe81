"""`generate`: samples and records from prompts, interrupted runs, and errors."""

import json
import os
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
import tiny
import transformers
from json_lines import read_lines, write_lines
from tokenizers import Tokenizer, processors

from distill_jax import config
from distill_jax.commands import generate
from distill_jax.data import corpus
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.prompts import read_prompts
from distill_jax.models import loading, runs
from distill_jax.nn import sharding
from distill_jax.records import sampler
from distill_jax.records.store import open_store
from distill_jax.types import Inputs

PROMPTS = ["3 times 6 is", "hello", "a", "0 times 3 is 0, as anyone can see.", "ünï"]


def made(folder: Path, **changes):
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.teacher.shape = "tiny-window"
  path = folder / "prompts.jsonl"
  path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
  c.mesh.fsdp, c.mesh.data = 2, 2
  c.data.seq_len = 128
  c.generate.update(
    prompts=str(path),
    samples=3,
    max_new_tokens=20,
    cache_len=64,
    batch_size=4,
    prefill_chunk=16,
    steps=4,
  )
  c.generate.update(changes)
  return c


def run(c, folder: Path):
  folder.mkdir(exist_ok=True)
  return generate.run(config.resolve(c), folder)


def job_of(c) -> GenerationJob:
  return GenerationJob.from_config(config.resolve(c))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(folder, result) of a run with records."""
  folder = tmp_path_factory.mktemp("generate")
  c = made(folder, records_dir=str(folder / "records"))
  return folder, run(c, folder / "whole")


def test_samples_are_complete_and_in_order(whole):
  folder, result = whole
  rows = read_lines(folder / "whole" / "samples.jsonl")
  assert [(r["id"], r["sample"]) for r in rows] == [(p, s) for p in range(5) for s in range(3)]
  tokenizer = load_tokenizer(folder / "tokenizer.json")
  for r in rows:
    assert r["text"] == tokenizer.decode(r["tokens"]) and len(r["tokens"]) == 20
    assert r["reason"] == "length" and r["logprob"] < 0
    assert r["logprob_mean"] == pytest.approx(r["logprob"] / 20)
  assert len({r["text"] for r in rows}) == len(rows)
  assert result["samples"] == result["length"] == 15 and result["tokens"] == 300
  assert (folder / "whole" / "samples.rejected.jsonl").read_text() == ""
  assert not list((folder / "whole").glob("*.part.*"))
  again = run(made(folder, records_dir=str(folder / "records")), folder / "whole")
  assert again["samples"] == 15 and again["tokens_per_second"] == 0


def test_records_equal_those_of_record(whole):
  """Compares with `record` on packed texts, with offsets by (seed, prompt, sample, position)."""
  folder, _ = whole
  c = config.resolve(made(folder))
  store, rows = open_store(folder / "records"), read_lines(folder / "whole" / "samples.jsonl")
  tokenizer = load_tokenizer(folder / "tokenizer.json")
  docs = [tokenizer.encode(r["prompt"]) + r["tokens"] for r in rows]
  keys = runs.keys(c.seed)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  built = loading.open_source(c.teacher).load(mesh, keys["teacher"])
  number = learnt = same = 0
  for i in range(len(store)):
    row = store[i]
    T = len(row["tokens_T"])
    u, positions, want_mask = np.zeros(T, np.float32), np.zeros(T, np.int32), np.zeros(T, bool)
    at = 0
    while at < T and row["segments_T"][at]:
      doc, r = docs[number], rows[number]
      assert row["tokens_T"][at : at + len(doc)].tolist() == doc
      key = jax.random.fold_in(keys["records"], r["id"])
      key = jax.random.fold_in(key, r["sample"])
      n = np.arange(len(doc))
      u[at + n] = jax.vmap(lambda t, k=key: jax.random.uniform(jax.random.fold_in(k, t)))(n)
      positions[at + n] = n
      want_mask[at + len(doc) - 21 : at + len(doc) - 1] = True
      at, number = at + len(doc), number + 1
    np.testing.assert_array_equal(row["mask_T"], want_mask)
    out = built.model(
      Inputs(row["tokens_T"][None], positions[None], row["segments_T"][None]), built.compute
    )
    labels = np.append(row["tokens_T"][1:], 0)[None].astype(np.int32)
    spec = sampler.SamplerSpec(c.records.n)
    want = sampler.summarise(out.hidden_BTD, out.head_VD, labels, u[None], spec, chunk=32)
    for t in np.flatnonzero(want_mask):
      ids, counts = np.unique(np.asarray(want["ids"][0, t]), return_counts=True)
      keep = row["weight_TK"][t] > 0
      got = dict(zip(row["ids_TK"][t][keep].tolist(), row["weight_TK"][t][keep], strict=True))
      same += got.keys() == set(ids.tolist()) and np.allclose(
        [got[j] for j in ids.tolist()], counts / c.records.n, atol=1e-6
      )
      learnt += 1
    for name in ("entropy", "label_logp"):
      a, b = row[f"{name}_T"][want_mask], np.asarray(want[name])[0][want_mask]
      np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3)  # stored as float16
  assert number == len(docs) and learnt == 300
  assert same > 0.97 * learnt  # float32 ties


class Killed(BaseException):
  pass


def test_an_interrupted_run_continues_from_any_point(whole, tmp_path, monkeypatch):
  """Interrupted in the middle of a line, a run writes the same samples and the same records.

  The files are the same as after kill -9, which test_remote.py sends.
  """
  folder, _ = whole
  add = SampleJournal.add

  def some(self, rows, records):
    add(self, rows, records)
    if len(self.rows) >= 4:
      raise Killed

  c = made(folder, records_dir=str(tmp_path / "records"))
  with monkeypatch.context() as stopped, pytest.raises(Killed):
    stopped.setattr(SampleJournal, "add", some)
    run(c, tmp_path / "killed")
  part = tmp_path / "killed" / "samples.part.jsonl"
  before = part.read_bytes().splitlines(keepends=True)
  assert 5 <= len(before) < 16
  part.write_bytes(b"".join(before) + b'{"prompt": 4, "sam')
  with (tmp_path / "killed" / "samples.part.bin").open("ab") as f:
    f.write(b"half of a record")
  run(c, tmp_path / "killed")
  one, two = (f / "samples.jsonl" for f in (folder / "whole", tmp_path / "killed"))
  assert one.read_bytes() == two.read_bytes()
  a, b = open_store(folder / "records").manifest, open_store(tmp_path / "records").manifest
  assert a.digest == b.digest and os.fspath(folder) != os.fspath(tmp_path)


def test_an_unfinished_run_with_other_settings_raises(tmp_path):
  folder = tmp_path / "w"
  folder.mkdir()
  (folder / "samples.part.jsonl").write_text('{"prompts": "other", "teacher": {}}\n')
  with pytest.raises(InputError, match="has samples with prompts='other', but this run has"):
    run(made(tmp_path), folder)


def chat_folder(folder: Path, template: str) -> Path:
  folder.mkdir()
  tokenizer = Tokenizer.from_file(str(tiny.write_tokenizer(folder / "tokenizer.json")))
  assert tokenizer.get_vocab_size() == 256
  settings = {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


GOOD = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MUTE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"


def test_chats_stops_and_rejected_prompts(tmp_path):
  """Messages and text through a template; rejected prompts are written with the reason."""
  c = made(
    tmp_path,
    field="q",
    chat=True,
    on_bad="skip",
    samples=1,
    temperature=0.0,
    records_dir=str(tmp_path / "r"),
    cache_len=40,
  )
  c.records.kind = "text"
  c.data.tokenizer = str(chat_folder(tmp_path / "t", GOOD))
  hi = {"role": "user", "content": "hi"}
  rows = [{"q": "hi"}, {"q": [hi]}, {"q": "x" * 40}, {"p": "hi"}, {"q": [1]}, {"q": [hi, hi]}]
  rows += [{"q": "\ud800"}, {"q": "hi", "answer": "\udfff"}]
  path = Path(c.generate.prompts)
  path.write_text("\n".join(map(json.dumps, rows)) + "\n\nno json\n")
  result = run(c, tmp_path / "one")
  got = {r["id"]: r for r in read_lines(tmp_path / "one" / "samples.jsonl")}
  why = {r["id"]: r["reason"] for r in read_lines(tmp_path / "one" / "samples.rejected.jsonl")}
  assert got.keys() == {0, 1, 5} and why.keys() == {2, 3, 4, 6, 7, 8}
  assert (result["prompts"], result["rejected"]) == (3, 6)
  assert got[0]["tokens"] == got[1]["tokens"] != got[5]["tokens"]
  reasons = {2: "most 39", 3: "no field 'q'", 4: "messages", 6: "half", 7: "half", 8: "line 10"}
  for n, reason in reasons.items():
    assert reason in why[n]
  store = open_store(tmp_path / "r")
  assert store.manifest.kind == "text"
  read = load_tokenizer(tmp_path / "t").decode(store[0]["tokens_T"].tolist())
  assert read.startswith("[user]hi\n[assistant]")
  assert store[0]["mask_T"].sum() == sum(len(r["tokens"]) for r in got.values())
  assert len(got[5]["tokens"]) == 40 - len("[user]hi\n[user]hi\n[assistant]")  # the cache ends
  stop = got[5]["text"][5:8]
  c.generate.stop = (stop,)
  c.generate.records_dir = ""
  run(c, tmp_path / "two")
  ended = read_lines(tmp_path / "two" / "samples.jsonl")[-1]
  assert ended["reason"] == "stop" and ended["text"] == got[5]["text"].partition(stop)[0]
  c.generate.on_bad = "stop"
  with pytest.raises(InputError, match="line 3: The prompt has"):
    run(c, tmp_path / "three")


@pytest.mark.parametrize("bos", ["<s>", None])
def test_text_starts_with_the_bos_token_of_the_tokenizer(tmp_path, bos):
  """Text starts as in transformers and as documents do, a chat as in its template."""
  c = tiny.tiny(tmp_path)
  path = tmp_path / "tokenizer.json"
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": GOOD}
  if bos:
    backend = Tokenizer.from_file(str(path))
    backend.add_special_tokens([bos])
    special = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=special
    )
    backend.save(str(path))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  c.generate.prompts = str(tmp_path / "prompts.jsonl")
  hi = [{"role": "user", "content": "hi"}]
  rows = [{"prompt": "ünï"}, {"prompt": hi}]
  write_lines(Path(c.generate.prompts), rows)
  tokenizer = load_tokenizer(path)
  ids = read_prompts(job_of(c), tokenizer).ids
  assert ids[0] == theirs("ünï").input_ids and (ids[0][0] == 256) == bool(bos)
  chat = theirs.apply_chat_template(hi, add_generation_prompt=True, return_dict=False)
  assert ids[1] == chat
  row = next(corpus.sequences(config.resolve(c).data, tokenizer))
  text = Path(c.data.path).read_text()[:20]
  assert row["tokens_T"][: len(theirs(text).input_ids)].tolist() == theirs(text).input_ids


def test_prompts_in_a_bucket(tmp_path, monkeypatch):
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path))
  fsspec.filesystem("memory").pipe("/bucket/asked/p.txt", b"one\n\ntwo\n")
  c = config.base()
  c.generate.prompts = "memory://bucket/asked/p.txt"
  assert read_prompts(job_of(c)).prompts == {0: ("one", {}), 1: ("two", {})}
  c.generate.prompts = "memory://bucket/asked/q.txt"
  with pytest.raises(InputError, match="q.txt'; expected an existing file"):
    read_prompts(job_of(c))


def test_a_template_without_a_generation_prompt(tmp_path):
  c = made(tmp_path, chat=True, on_bad="skip")
  c.data.tokenizer = str(chat_folder(tmp_path / "t", MUTE))
  with pytest.raises(InputError, match="no prompt that can be used.*writes no generation promp"):
    run(c, tmp_path / "w")


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"prompts": "nowhere.txt"}, "expected an existing file"),
    ({"on_bad": "ignore"}, "on_bad"),
    ({"cache_len": 1000}, "cache_len is 1000; expected 2 to 128"),
    ({"batch_size": 3}, "generate.batch_size is 3"),
    ({"steps": 0}, "generate.steps"),
    ({"top_p": 0.0}, "top_p"),
    ({"cache_dtype": "int4"}, "cache_dtype is 'int4'"),
    ({"records_dir": "r", "cache_len": 128}, "data.seq_len is 64"),
  ],
)
def test_bad_configs_raise(tmp_path, changes, says):
  c = made(tmp_path, **changes)
  if "records_dir" in changes:
    c.data.seq_len = 64
  with pytest.raises(InputError, match=says):
    run(c, tmp_path / "w")


def test_a_line_without_its_binary_record_is_sampled_again(tmp_path):
  """This happens in a copy of a workdir that was made during a run."""
  record, about = np.dtype([("ids", "<i4", (3,))]), {"prompts": "p", "teacher": {}}
  rows = [{"prompt": i, "sample": 0, "tokens": [1] * (i + 1)} for i in range(3)]
  kept = [{"ids": [np.full(3, i, np.int32)] * (i + 1)} for i in range(3)]
  with SampleJournal(tmp_path, about, record) as f:
    f.add(rows, kept)
  with (tmp_path / "samples.part.bin").open("r+b") as b:
    b.truncate(5 * record.itemsize + 1)
  with SampleJournal(tmp_path, about, record) as f:
    assert f.rows == rows[:2]
    f.add(rows[2:], kept[2:])
  with SampleJournal(tmp_path, about, record) as f:
    assert f.rows == rows
    for i in range(3):
      assert f.records(i)["ids"].tolist() == [[i] * 3] * (i + 1)
  (tmp_path / "samples.part.jsonl").write_text(json.dumps(about) + "\n{broken\n")
  with pytest.raises(InputError, match="line 2 is damaged"):
    SampleJournal(tmp_path, about, record)
