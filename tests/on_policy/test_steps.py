"""The steps of rounds: a student that is its own teacher, several teachers, and records."""

import pytest
import tiny
import tiny_on_policy
from json_lines import write_lines

from distill_jax import config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.on_policy import feed, run_setup
from distill_jax.records.store import open_store
from distill_jax.runtime import checkpoint


def test_a_student_that_is_its_own_teacher_has_a_loss_of_zero(tiny_run, tmp_path):
  c = tiny_on_policy.on_policy_config(tmp_path)
  c.student.source = c.teacher.source = f"run:{tiny_run / 'teacher'}"
  for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
    c.losses[divergence] = config.loss("kd", divergence=divergence)
  c.train.steps = 1
  row = tiny_on_policy.run(c, tmp_path / "run")
  # Terms of the divergences of about 1e-7, the rounding of log-probabilities in float32.
  assert abs(row["forward_kl"]) < 1e-6 and abs(row["reverse_kl"]) < 1e-6
  assert abs(row["jensen_shannon"]) < 1e-6
  assert row["grad_norm"] < 1e-4
  assert row["overlap/teacher"] == 1
  assert row["student_mass/teacher"] == pytest.approx(row["teacher_mass/teacher"], rel=1e-5)
  assert row["drift"] < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("online", [True, False])
def test_a_step_has_texts_of_one_teacher(tiny_run, tmp_path, online):
  """Half of the prompts name a trained teacher, the others have a random one."""
  c = tiny_on_policy.on_policy_config(tmp_path, code=6)
  c.on_policy.every = c.train.checkpoint_every = 2
  c.teachers = {"code": f"run:{tiny_run / 'teacher'}"}
  c.train.online = online
  if not online:
    c.records.kind, c.records.n = "topk", 64
  tiny_on_policy.run(c, tmp_path / "run")
  rows = tiny.measured(tmp_path / "run")
  names = [key.partition("/")[2] for row in rows for key in row if key.startswith("loss/")]
  assert len(names) == 4 and set(names) == {"teacher", "code"}
  for name, row in zip(names, rows, strict=True):
    assert row[f"loss/{name}"] == row["loss"]
    # The trained teacher is far from the student, whose weights are random as the other's.
    assert (row["soft"] > 1) == (name == "code")
  for number in (0, 1):
    folder = tmp_path / f"run/rounds/{number:05d}"
    own = names[2 * number : 2 * number + 2]
    assert {p.name for p in folder.iterdir() if p.is_dir()} == set(own)
    for name in own:
      found = open_store(folder / name / ("rollouts" if online else "records"))
      assert len(found) == 4 * own.count(name)


@pytest.mark.slow
def test_a_fraction_of_the_steps_trains_on_records_also_after_a_stop(tiny_run, tmp_path):
  c = tiny_on_policy.on_policy_config(tmp_path)
  c.on_policy.records_fraction, c.on_policy.every, c.train.steps = 0.5, 3, 6
  c.train.records = (str(tiny_run / "text"),)
  c.generate.cache_len = tiny.SEQ_LEN
  tiny_on_policy.run(c, tmp_path / "whole")
  rows = tiny.measured(tmp_path / "whole")
  assert ["lag" in row for row in rows] == [True, False] * 3
  records = open_store(tiny_run / "text")
  assert [row["tokens"] for row in rows[1::2]] == [4 * (records[0]["mask_T"].sum())] * 3
  real = feed.RoundsFeed.next
  for stop in (1, 4):

    def stopping(self, step, stop=stop):
      if step == stop:
        raise KeyboardInterrupt
      return real(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(feed.RoundsFeed, "next", stopping)
      tiny_on_policy.run(c, tmp_path / "stopped")
  tiny_on_policy.run(c, tmp_path / "stopped")
  assert tiny.measured(tmp_path / "stopped") == rows
  assert checkpoint.digest(tmp_path / "stopped") == checkpoint.digest(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "shared", "quantised"])
def test_other_trained_parameters(tmp_path, train):
  c = tiny_on_policy.on_policy_config(tmp_path)
  c.student.train = train
  match train:
    case "lora":
      c.student.lora.rank = 2
    case "shared":
      c.student.share.layers = 2
    case "quantised":
      c.student.quantise.grid = "int8"
  tiny_on_policy.run(c, tmp_path / "run")
  rows = tiny.measured(tmp_path / "run")
  assert rows[0]["drift"] < 5e-3


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"on_policy.lag": 2}, "on_policy.lag is 2; expected 0 or 1. Choose"),
    ({"on_policy.keep_rounds": -1}, "on_policy.keep_rounds is -1; expected a positive number"),
    ({"on_policy.records_fraction": 0.5}, "records_fraction is 0.5; expected 0 without train.rec"),
    ({"train.records": ("r",)}, "records_fraction is 0.0; expected a fraction above 0 with train"),
    ({"train.teachers": {"b": ("r",)}}, "train.teachers is .*; expected {} with `on_policy`"),
    (
      {"generate.server.urls": ("http://x",)},
      "server.urls is set; expected no servers",
    ),
    ({"train.online": False, "records.kind": "text"}, "records.kind is 'text'; expected a kind"),
  ],
)
def test_config_keys_that_rounds_cannot_have(tmp_path, changes, message):
  c = tiny_on_policy.on_policy_config(tmp_path)
  with c.unlocked():
    for key, value in changes.items():
      c.update_from_flattened_dict({key: value})
  with pytest.raises(InputError, match=message):
    tiny_on_policy.run(c, tmp_path / "run")


def test_the_size_of_shards_may_change_between_two_calls(tmp_path):
  """A checkpoint has the digest of the plan of the texts, which must not depend on it."""
  c = tiny_on_policy.on_policy_config(tmp_path)
  tokenizer = corpus.tokenizer_of(config.resolve(c).data, None)
  digests = set()
  for tokens in (24, 48):
    c.records.tokens_per_shard = tokens
    planned = run_setup.planned_store(config.resolve(c), tokenizer, tmp_path, "prompts")
    digests.update(planned.digests)
  assert len(digests) == 1


@pytest.mark.slow
def test_rounds_are_evaluated_as_other_runs(tiny_run, tmp_path):
  """Held-out records and a benchmark are evaluated, and the sampled texts stay the same."""
  c = tiny_on_policy.on_policy_config(tmp_path)
  tiny_on_policy.run(c, tmp_path / "plain")
  questions = tmp_path / "words.jsonl"
  write_lines(questions, [{"question": f"{i} + {i} =", "answer": "?"} for i in range(3)])
  c.train.heldout, c.train.eval_every = (str(tiny_run / "text"),), 2
  c.train.eval_benchmarks, c.train.best_metric = ("words",), "heldout/loss"
  c.evaluate.max_new_tokens = 6
  c.evals.words = config.benchmark("jsonl", path=str(questions), score="exact")
  result = tiny_on_policy.run(c, tmp_path / "run")
  plain, rows = (tiny.measured(tmp_path / name) for name in ("plain", "run"))
  assert [row["step"] for row in rows if "heldout/words/accuracy" in row] == [1, 3]
  for a, b in zip(plain, rows, strict=True):
    assert a == {name: x for name, x in b.items() if not name.startswith("heldout/")}
  assert result["best_step"] in (2, 4)
