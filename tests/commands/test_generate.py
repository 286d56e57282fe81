"""`generate`: samples and records from prompts, interrupted runs, and errors."""

import itertools
import json
from pathlib import Path

import fsspec
import jax
import mesh_worker
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
from distill_jax.generation import local_writer
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.local_writer import LocalWriter
from distill_jax.generation.prompts import Prompt, Prompts
from distill_jax.models import loading, runs
from distill_jax.nn import sharding
from distill_jax.records import sampler
from distill_jax.records.store import open_store
from distill_jax.runtime import files, storage
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
  """(folder, result, tokens by (prompt, sample)) of a run with records."""
  folder = tmp_path_factory.mktemp("generate")
  c = made(folder, records_dir=str(folder / "records"))
  tokens = {}
  with pytest.MonkeyPatch.context() as spied:
    finished = LocalWriter._finished

    def spy(self, s):
      tokens[s.key] = list(s.tokens)
      return finished(self, s)

    spied.setattr(LocalWriter, "_finished", spy)
    return folder, run(c, folder / "whole"), tokens


def test_samples_are_complete_and_in_order(whole):
  folder, result, tokens = whole
  rows = read_lines(folder / "whole" / "samples")
  assert [(r["id"], r["sample"]) for r in rows] == [(p, s) for p in range(5) for s in range(3)]
  tokenizer = load_tokenizer(folder / "tokenizer.json")
  for r in rows:
    assert r["text"] == tokenizer.decode(tokens[r["id"], r["sample"]]) and r["token_count"] == 20
    assert r["reason"] == "length" and r["logprob"] < 0
    assert r["logprob_mean"] == pytest.approx(r["logprob"] / 20)
  assert len({r["text"] for r in rows}) == len(rows)
  assert result["samples"] == result["length"] == 15 and result["tokens"] == 300
  names = {path.name for path in (folder / "whole").rglob("*")}
  assert names == {"samples", "00000.jsonl", "generate.json"}  # no log, and nothing is rejected
  again = run(made(folder, records_dir=str(folder / "records")), folder / "whole")
  assert again["samples"] == 15 and again["tokens_per_second"] == 0


def test_records_equal_those_of_record(whole):
  """Compares with `record` on packed texts, with offsets by (seed, prompt, sample, position)."""
  folder, _, tokens = whole
  c = config.resolve(made(folder))
  store, rows = open_store(folder / "records"), read_lines(folder / "whole" / "samples")
  tokenizer = load_tokenizer(folder / "tokenizer.json")
  docs = [tokenizer.encode(r["prompt"]) + tokens[r["id"], r["sample"]] for r in rows]
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


@pytest.mark.parametrize("written", [4, 11])
def test_an_interrupted_run_continues_from_any_point(whole, tmp_path, monkeypatch, written):
  """A run that is killed writes the same samples and the same records, in shards of two rows.

  The files are the same as after kill -9, which test_remote.py sends.
  """
  folder, _, _ = whole
  add = SampleJournal.add

  def some(self, finished):
    for one in finished:
      add(self, [one])
      if self.counts.samples >= written:
        raise Killed

  c = made(folder, records_dir=str(tmp_path / "records"))
  c.records.tokens_per_shard = 2 * c.data.seq_len
  monkeypatch.setattr(local_writer, "WRITE_EVERY_S", 0.0)
  with monkeypatch.context() as stopped, pytest.raises(Killed):
    stopped.setattr(SampleJournal, "add", some)
    run(c, tmp_path / "killed")
  pieces = list((tmp_path / "killed" / "samples/.log").glob("*.piece"))
  assert 0 < len(pieces) <= written and not (tmp_path / "killed" / "generate.json").exists()
  if (tmp_path / "records" / "manifest.json").exists():
    c.records.tokens_per_shard *= 2  # which changes nothing: the store keeps its own
  run(c, tmp_path / "killed")
  one, two = (f / "samples/00000.jsonl" for f in (folder / "whole", tmp_path / "killed"))
  assert one.read_bytes() == two.read_bytes()
  whole_store, store = open_store(folder / "records"), open_store(tmp_path / "records")
  assert len(store.manifest.shards) == 3 and len(whole_store.manifest.shards) == 5
  for i in range(len(whole_store)):
    for name, values in whole_store[i].items():
      np.testing.assert_array_equal(store[i][name], values, name)


@pytest.mark.slow
def test_two_processes_continue_the_run_of_one(tmp_path, monkeypatch):
  """Two processes find out from the first which samples are missing, and it alone writes."""
  c = made(tmp_path)
  c.mesh.fsdp, c.mesh.data = 2, 1
  jobs = {}
  for n in (1, 2):
    c.generate.records_dir = str(tmp_path / f"records{n}")
    jobs[n] = [("generate", tmp_path / f"run{n}", config.resolve(c))]
  mesh_worker.run(jobs[1], tmp_path / "one.json", 1, 2)
  add = SampleJournal.add

  def some(self, finished):
    add(self, finished)
    if self.counts.samples >= 4:
      raise Killed

  monkeypatch.setattr(local_writer, "WRITE_EVERY_S", 0.0)
  with monkeypatch.context() as stopped, pytest.raises(Killed):
    stopped.setattr(SampleJournal, "add", some)
    c.mesh.data = 2
    run(c, tmp_path / "run2")
  mesh_worker.run(jobs[2], tmp_path / "two.json", 2, 1)
  one, two = (tmp_path / f"run{n}" / "samples/00000.jsonl" for n in (1, 2))
  assert [json.loads(x)["text"] for x in one.read_text().splitlines()] == [
    json.loads(x)["text"] for x in two.read_text().splitlines()
  ]
  one, two = (open_store(tmp_path / f"records{n}") for n in (1, 2))
  assert len(one) == len(two) > 4
  for i in range(len(one)):
    np.testing.assert_array_equal(one[i]["tokens_T"], two[i]["tokens_T"])


def test_a_run_and_its_store_at_urls_continue_on_another_machine(whole, tmp_path, monkeypatch, s3):
  """Nothing on the disk of a killed run is needed, resets and 503s lose nothing, and the samples
  and records are those of a run without interruptions in local folders."""
  folder, _, _ = whole
  url, add = s3.url, SampleJournal.add
  c = made(tmp_path, records_dir=f"{url}/records")
  c.records.tokens_per_shard = 2 * c.data.seq_len
  monkeypatch.setattr(local_writer, "WRITE_EVERY_S", 0.0)

  def some(self, finished):
    add(self, finished)
    if self.counts.samples >= 8:
      raise Killed

  def once():
    with storage.Synced(f"{url}/run") as mirror:
      return generate.run(config.resolve(c), mirror)

  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "one"))
  with monkeypatch.context() as stopped, pytest.raises(Killed):
    stopped.setattr(SampleJournal, "add", some)
    once()
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "two"))
  faults = itertools.cycle([*[None] * 12, 503, *[None] * 12, "reset_request"])
  s3.proxy.fault = lambda method, path: next(faults)
  result = once()
  s3.proxy.fault = lambda method, path: None
  want = (folder / "whole" / "samples/00000.jsonl").read_bytes()
  assert files.read(f"{url}/run/samples/00000.jsonl") == want and result["samples"] == 15
  assert not files.listing(f"{url}/run/samples/.log")
  assert once()["tokens_per_second"] == 0  # it is finished
  whole_store, store = open_store(folder / "records"), open_store(f"{url}/records")
  assert len(store.manifest.shards) == 3
  for i in range(len(whole_store)):
    for name, values in whole_store[i].items():
      np.testing.assert_array_equal(store[i][name], values, name)


def test_an_unfinished_run_with_other_settings_raises(tmp_path):
  c = made(tmp_path)
  SampleJournal(str(tmp_path / "w"), {"prompts": "other", "teacher": {}}, 3, ())
  with pytest.raises(InputError, match="has samples with prompts='other', but this run has"):
    run(c, tmp_path / "w")


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
  got = {r["id"]: r for r in read_lines(tmp_path / "one" / "samples")}
  why = {r["id"]: r["reason"] for r in read_lines(tmp_path / "one" / "samples.rejected")}
  assert got.keys() == {0, 1, 5} and why.keys() == {2, 3, 4, 6, 7, 8}
  assert (result["prompts"], result["rejected"]) == (3, 6)
  assert got[0]["text"] == got[1]["text"] != got[5]["text"]
  reasons = {2: "most 39", 3: "no field 'q'", 4: "messages", 6: "half", 7: "half", 8: "line 10"}
  for n, reason in reasons.items():
    assert reason in why[n]
  store = open_store(tmp_path / "r")
  assert store.manifest.kind == "text"
  read = load_tokenizer(tmp_path / "t").decode(store[0]["tokens_T"].tolist())
  assert read.startswith("[user]hi\n[assistant]")
  assert store[0]["mask_T"].sum() == sum(r["token_count"] for r in got.values())
  assert got[5]["token_count"] == 40 - len("[user]hi\n[user]hi\n[assistant]")  # the cache ends
  stop = got[5]["text"][5:8]
  c.generate.stop = (stop,)
  c.generate.records_dir = ""
  run(c, tmp_path / "two")
  ended = read_lines(tmp_path / "two" / "samples")[-1]
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
  ids = [prompt.ids for prompt in Prompts(job_of(c), tokenizer).read()]
  assert ids[0] == theirs("ünï").input_ids and (ids[0][0] == 256) == bool(bos)
  chat = theirs.apply_chat_template(hi, add_generation_prompt=True, return_dict=False)
  assert ids[1] == chat
  row = next(corpus.sequences(config.resolve(c).data, tokenizer))
  text = Path(c.data.path).read_text()[:20]
  assert row["tokens_T"][: len(theirs(text).input_ids)].tolist() == theirs(text).input_ids


def test_prompts_in_a_bucket(tmp_path, monkeypatch):
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path))
  fs = fsspec.filesystem("memory")
  fs.pipe("/bucket/asked/p.txt", b"\xef\xbb\xbfone\n\ntwo\n")
  fs.pipe("/bucket/asked/q.txt", b"three\n")
  c = config.base()
  c.generate.prompts = "memory://bucket/asked/p.txt"
  two = [Prompt(0, "one", {}), Prompt(1, "two", {})]
  assert [*Prompts(job_of(c)).read()] == two
  c.generate.prompts = "memory://bucket/asked"
  assert [*Prompts(job_of(c)).read()] == [*two, Prompt(2, "three", {})]
  assert [*Prompts(job_of(c)).read(2)] == [Prompt(2, "three", {})]
  c.generate.prompts = "memory://bucket/asked/r.txt"
  with pytest.raises(InputError, match="r.txt'; expected an existing file, or a folder"):
    Prompts(job_of(c))


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
    ({"batch_size": 0}, "generate.batch_size is 0"),
    ({"gather": "never"}, "generate.gather is 'never'; expected one of"),
    ({"top_p": 0.0}, "top_p"),
    ({"temperature": 0.0}, "generate.samples is 3; expected 1 with generate.temperature=0"),
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
