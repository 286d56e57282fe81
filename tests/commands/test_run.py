"""A complete run on a tiny model: record, train, stop, resume, evaluate, export, report."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from tiny_run import record, train

from distill_jax import config
from distill_jax.commands import export, report
from distill_jax.commands.evaluate import run as evaluate
from distill_jax.errors import InputError
from distill_jax.models import loading, runs
from distill_jax.nn import sharding
from distill_jax.records import collate
from distill_jax.records.store import open_store
from distill_jax.report.deployment import Deployment, ModelFile
from distill_jax.runtime import checkpoint, json_io
from distill_jax.runtime.workdir import read_config
from distill_jax.training import loop as training
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.stores import open_stores


@pytest.fixture(scope="module")
def online(tiny_run, tmp_path_factory):
  """The run of two steps with the teacher in the step."""
  c = tiny.tiny(tiny_run)
  c.train.online, c.train.steps = True, 2
  train(c, workdir := tmp_path_factory.mktemp("online"))
  return workdir


def last_state(c, workdir):
  resolved = config.resolve(c)
  step = training.make_step(resolved, open_stores(resolved))
  like = jax.eval_shape(step.init, loading.open_source(resolved.student).abstract)
  mesh = sharding.make_mesh()
  like = sharding.with_shardings(like, sharding.shardings(like, mesh, step.student.rules))
  with checkpoint.manager(workdir, 2) as saves:
    return jax.device_get(checkpoint.restore(saves, like, {}))


@pytest.mark.smoke
def test_resume_equals_uninterrupted_bit_for_bit(tiny_run, tmp_path):
  """Stopped after step 4 of 6 by an error in the fifth batch, then run again."""
  c = tiny.tiny(tiny_run)
  whole, stopped = tiny_run / "whole", tmp_path / "stopped"
  real, seen = collate.to_device, []

  def power_cut(batch, where):
    seen.append(batch)
    if len(seen) == 5:
      raise KeyboardInterrupt
    return real(batch, where)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(collate, "to_device", power_cut)
    with pytest.raises(KeyboardInterrupt):
      train(c, stopped)
  assert sorted(p.name for p in (stopped / "checkpoints").iterdir()) == ["2", "4"]
  train(c, stopped)
  a, b = last_state(c, whole), last_state(c, stopped)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert tiny.measured(whole) == tiny.measured(stopped)
  assert [row["step"] for row in read_metrics(stopped)] == list(range(6))


def test_training_lowers_the_loss(tiny_run):
  rows = read_metrics(tiny_run / "whole")
  assert rows[-1]["kl/teacher"] < rows[0]["kl/teacher"]


def test_recording_again_does_nothing(tiny_run):
  again = record(tiny.tiny(tiny_run), tiny_run / "records")
  assert again["sequences"] == 20
  assert again["recorded_now"] == 0


def test_records_agree_with_the_teacher(tiny_run):
  """Counts are within one point of the distribution; entropy and label log-prob are exact."""
  resolved = config.resolve(tiny.tiny(tiny_run))
  mesh = sharding.make_mesh()
  store = open_store(tiny_run / "records")
  batch = collate.collate([store[i] for i in range(4)])
  with jax.set_mesh(mesh):
    teacher = loading.open_source(resolved.teacher).load(mesh, runs.keys(resolved.seed)["teacher"])
    out = teacher.model(jax.tree.map(jax.numpy.asarray, batch.inputs), teacher.compute)
  hidden, rows = np.float64(out.hidden_BTD), np.float64(out.head_VD)
  logits = hidden @ rows.T
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  p, t, keep = np.exp(logp), batch.targets["teacher"], batch.mask_BT
  dense = np.zeros_like(p)
  np.put_along_axis(dense, t.ids_BTK, 0.0, -1)
  for k in range(t.ids_BTK.shape[-1]):
    at = np.take_along_axis(dense, t.ids_BTK[..., k : k + 1], -1)
    np.put_along_axis(dense, t.ids_BTK[..., k : k + 1], at + t.weight_BTK[..., k : k + 1], -1)
  assert np.abs(dense - p)[keep].max() <= 1 / 15 + 1e-6
  np.testing.assert_allclose(dense.sum(-1)[keep], 1, rtol=1e-6)
  # Stored as float16: 2**-11 relative.
  np.testing.assert_allclose(t.entropy_BT[keep], -(p * logp).sum(-1)[keep], rtol=6e-4)
  label = np.take_along_axis(logp, batch.labels_BT[..., None], -1)[..., 0]
  np.testing.assert_allclose(t.label_logp_BT[keep], label[keep], rtol=6e-4)


def test_an_online_teacher_agrees_with_records(tiny_run, online):
  """The same teacher runs in the step, without sampling noise."""
  rows = read_metrics(online)
  recorded = read_metrics(tiny_run / "whole")
  # 15 points, averaged over 124 positions: a few hundredths of a nat.
  assert rows[0]["kl/teacher"] == pytest.approx(recorded[0]["kl/teacher"], abs=0.05)
  assert rows[0]["ce"] == pytest.approx(recorded[0]["ce"], rel=1e-6)


def test_evaluate_export_report(tiny_run, tmp_path):
  c = tiny.tiny(tiny_run)
  c.evaluate.models = {"distilled": f"run:{tiny_run / 'whole'}"}
  c.evaluate.batch_size = 4
  c.export.dir = str(tmp_path / "export")
  resolved = config.resolve(c)
  evaluation = evaluate(resolved, tmp_path)
  models = evaluation["models"]
  assert models["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
  assert models["teacher"]["agreement"] == 1
  assert models["distilled"]["kl"] < models["start"]["kl"]
  assert models["distilled"]["perplexity"] == pytest.approx(np.exp(models["distilled"]["ce"]))
  c.export.evaluation = str(tmp_path / "evaluation.json")
  c.export.deployment = str(tmp_path / "deployment.json")
  with pytest.raises(InputError, match=r"deployment\.json does not exist\. Run tools/bench"):
    export.run(config.resolve(c), tiny_run / "whole")
  file = ModelFile("teacher", "F16", 2_345_000)
  measured = ("a", "b", "a machine", "a runtime", 8, 4, 1, "a text", 10, "F16", (file,))
  saved = Deployment(*measured, "v5p", 4096, ())
  json_io.write_json(tmp_path / "deployment.json", saved.to_json())
  result = export.run(config.resolve(c), tiny_run / "whole")
  assert result["parameters"] == models["distilled"]["parameters"]
  card = (tmp_path / "export" / "README.md").read_text()
  assert f"{models['distilled']['kl']:.4g}" in card
  assert "| Teacher, F16 | 2.3 MB |" in card
  c.evaluate.models = {"distilled": str(tmp_path / "export")}
  c.student.source = f"run:{tiny_run / 'whole'}"
  again = evaluate(config.resolve(c), tmp_path / "again")["models"]["distilled"]
  # The export rounds the weights to bfloat16: a few thousandths of a nat.
  assert again["ce"] == pytest.approx(models["distilled"]["ce"], rel=5e-3)
  summary = report.run(dataclasses.replace(resolved), tmp_path)
  assert summary["distilled"]["kl"] == pytest.approx(models["distilled"]["kl"])
  page = (tmp_path / "report.html").read_text()
  assert "Distilled" in page
  assert "What a student saves" in page


def test_the_workdir_has_config_and_versions(tiny_run):
  saved = json.loads((tiny_run / "whole" / "config.json").read_text())
  assert config.from_dict(saved) == config.resolve(tiny.tiny(tiny_run))
  versions = json.loads((tiny_run / "whole" / "versions.json").read_text())
  assert versions["packages"]["jax"] == jax.__version__
  assert list((tiny_run / "whole").glob("events.out.tfevents.*"))


def test_a_loss_that_is_not_finite_stops_the_run(tiny_run, tmp_path):
  c = tiny.tiny(tiny_run)
  c.optim.peak_lr = 1e30
  with pytest.raises(FloatingPointError, match=r"grad_norm of step \d is (nan|inf)"):
    train(c, tmp_path / "nan")


def test_a_workdir_of_another_config_raises(tiny_run):
  c = tiny.tiny(tiny_run)
  c.optim.peak_lr = 5e-3
  with pytest.raises(InputError, match=r"holds a run with optim.peak_lr=0.01, but this config has"):
    train(c, tiny_run / "whole")


def test_a_run_with_unknown_config_keys_raises_with_its_file(tmp_path):
  tree = config.to_dict(config.resolve(tiny.tiny(tmp_path)))
  tree["records"]["taps_of"] = tree["records"].pop("tap_kind")
  (tmp_path / "config.json").write_text(json.dumps(tree))
  with pytest.raises(InputError, match=r"config.json does not fit .*'records.taps_of' is unknown"):
    read_config(tmp_path)


@pytest.mark.parametrize(
  "kind, options, losses",
  [
    ("topk", {"n": 8}, {"r": ("reverse_kl", 1.0), "j": ("jensen_shannon", 1.0)}),
    ("topk", {"n": 8, "missing_mass": "renormalise"}, {"f": ("forward_kl", 2.0)}),
    ("sampled", {"logp": True}, {"s": ("skew_kl", 1.0), "f": ("forward_kl", 2.0)}),
  ],
)
def test_every_kind_of_record_trains(tiny_run, tmp_path, kind, options, losses):
  c = tiny.tiny(tiny_run)
  name = f"{kind}-{'-'.join(options)}"
  c.records.kind = kind
  for key, value in options.items():
    c.records[key] = value
  c.losses = {n: config.loss("kd", divergence=d, temperature=T) for n, (d, T) in losses.items()}
  c.train.records = (str(tmp_path / name),)
  c.train.steps = c.train.checkpoint_every = 12
  record(c, tmp_path / name)
  train(c, tmp_path / f"{name}-run")
  rows = read_metrics(tmp_path / f"{name}-run")
  assert rows[-1]["loss"] < rows[0]["loss"]
  assert rows[0]["teacher_ce/teacher"] > 0


def test_losses_that_records_do_not_support_raise(tiny_run, tmp_path):
  c = tiny.tiny(tiny_run)
  c.losses = {"r": config.loss("kd", divergence="reverse_kl")}
  with pytest.raises(
    InputError, match=r"losses.r cannot use the records .*Record with records.logp=True"
  ):
    train(c, tmp_path / "refused")
  c.losses = {"f": config.loss("kd", weight=config.schedule((0, 0.0), (7, 1.0)))}
  with pytest.raises(InputError, match=r"losses\.f\.weight ends at step 7; expected at most 6"):
    train(c, tmp_path / "refused2")
  c.losses = {"f": config.loss("kd")}
  c.data.tokenizer = str(other_tokenizer(tiny_run, tmp_path))
  with pytest.raises(InputError, match="were made with another tokenizer .* than .*other.json"):
    train(c, tmp_path / "refused4")
  c = tiny.tiny(tiny_run)
  c.teacher.digest = "abc"
  with pytest.raises(
    InputError, match="teacher.digest is 'abc'; expected .*, the digest of the teacher of"
  ):
    train(c, tmp_path / "refused5")
  c = tiny.tiny(tiny_run)
  c.records.kind = "topk"
  record(c, tmp_path / "mixed")
  c.train.records = (str(tiny_run / "records"), str(tmp_path / "mixed"))
  with pytest.raises(
    InputError, match=r"stores to mix are .*\(sampled, none\), .*\(topk, tail_bucket\)"
  ):
    train(c, tmp_path / "refused6")
  c = tiny.tiny(tiny_run)
  c.records.temperature = 2.0
  record(c, tmp_path / "hot")
  c.train.records = (str(tiny_run / "records"), str(tmp_path / "hot"))
  c.losses = {"pseudo": config.loss("pseudo_label")}
  with pytest.raises(InputError, match="temperature is '1, 2'; expected one temperature for all"):
    train(c, tmp_path / "refused7")
  c = tiny.tiny(tiny_run)
  c.train.records = (str(tiny_run / "text"),)
  with pytest.raises(InputError, match="only hold text or labels"):
    train(c, tmp_path / "refused3")


def other_tokenizer(tiny_run, tmp_path):
  import tokenizers

  other = tokenizers.Tokenizer.from_file(str(tiny_run / "tokenizer.json"))
  other.add_special_tokens(["<extra>"])
  other.save(str(tmp_path / "other.json"))
  return tmp_path / "other.json"


def test_metrics_with_records_and_online_agree(tiny_run, online):
  """Recorded and online teachers give the same metrics, up to sampling and float16."""
  recorded = read_metrics(tiny_run / "whole")[0]
  run = read_metrics(online)[0]
  for name in ("ce", "entropy", "perplexity"):
    assert recorded[name] == pytest.approx(run[name], rel=1e-5), name
  for name in ("teacher_ce/teacher", "teacher_entropy/teacher"):
    assert recorded[name] == pytest.approx(run[name], rel=1e-3), name
  assert recorded["agreement/teacher"] == run["agreement/teacher"]


def test_a_failed_write_fails_the_recording(tiny_run, tmp_path, monkeypatch):
  from distill_jax.records.writer import Writer

  def full(*_):
    raise InputError("the disk is full")

  monkeypatch.setattr(Writer, "write_shard", full)
  with pytest.raises(InputError, match="the disk is full"):
    record(tiny.tiny(tiny_run), tmp_path / "full")


def test_a_store_is_extended_by_a_longer_corpus_and_not_by_another(tiny_run, tmp_path):
  c = tiny.tiny(tiny_run)
  c.data.sequences = 8
  record(c, tmp_path / "short")
  first = sorted((tmp_path / "short").glob("*.array_record"))[0]
  before = first.read_bytes()
  c.data.sequences, c.records.tokens_per_shard = 14, 4 * tiny.SEQ_LEN
  again = record(c, tmp_path / "short")  # with the size of the shards that the store has
  assert [s.count for s in open_store(tmp_path / "short").manifest.shards] == [6, 2, 6]
  assert (again["sequences"], again["recorded_now"]) == (14, 6)
  assert first.read_bytes() == before
  text = (tiny_run / "text.txt").read_text()
  c.data.path = str(tmp_path / "other.txt")
  (tmp_path / "other.txt").write_text(text[:200] + "Something else." + text[200:])
  c.data.sequences = 20
  with pytest.raises(InputError, match="has changed since its first 14 sequences were packed"):
    record(c, tmp_path / "short")


def test_the_responses_of_a_served_teacher_are_recorded(tiny_run, tmp_path):
  """Records hand-written prompt_logprobs in the format of vLLM."""
  ids = [65, 66, 67, 68]
  top = [None] + [{str(i): {"logprob": -0.1}, "9": {"logprob": -3.0}} for i in ids[1:]]
  line = json.dumps({"prompt_token_ids": ids, "prompt_logprobs": top})
  (tmp_path / "dump.jsonl").write_text(line + "\n")
  c = tiny.tiny(tiny_run)
  c.records.kind, c.records.n, c.records.logprobs = "topk", 4, str(tmp_path / "dump.jsonl")
  done = record(c, tmp_path / "served")
  assert done["sequences"] == 1
  row = open_store(tmp_path / "served")[0]
  assert sorted(row["ids_TK"][0][row["logp_TK"][0] > -np.inf]) == [9, 66]
