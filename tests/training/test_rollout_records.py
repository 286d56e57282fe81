"""Training on stores with the scalars of rollouts, and on records of kind "labels"."""

import dataclasses

import numpy as np
import pytest
import tiny
from json_lines import write_lines

from distill_jax import config
from distill_jax.commands import generate, record
from distill_jax.errors import InputError
from distill_jax.records import manifest, store
from distill_jax.training import loop
from distill_jax.training.metric_writer import read_metrics

pytestmark = pytest.mark.slow  # two runs compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with records of kind "labels", and with the same ones as if a student wrote them."""
  path = tmp_path_factory.mktemp("labels")
  c = tiny.tiny(path)
  c.teacher.source, c.records.kind, c.data.sequences = "", "labels", 12
  record.run(config.resolve(c), path / "records")
  found = store.open_store(path / "records")
  about = {"round": 0, "student": "s", "sampling": {}, "scalars": ["behaviour_logp"]}
  m = manifest.with_rollout(dataclasses.replace(found.manifest, shards=()), about)
  rows = [row | {"behaviour_logp_T": row["label_logp_T"]} for row in found.read_many(range(12))]
  with store.Writer(path / "rollouts", m) as writer:
    for some in m.ranges:
      writer.write_shard(some, [rows[i] for i in some])
    writer.complete()
  return path


def trained(folder, records, workdir, **losses):
  c = tiny.tiny(folder)
  c.teacher.source, c.train.records, c.losses = "", (str(folder / records),), losses
  loop.train(config.resolve(c), workdir)
  return read_metrics(workdir)


def test_training_on_the_probabilities_of_labels_alone(folder, tmp_path):
  rows = trained(folder, "records", tmp_path, k2=config.loss("log_ratio"))
  assert rows[-1]["k2"] < rows[0]["k2"]
  assert rows[0]["teacher_ce/teacher"] > 0 and "kl/teacher" not in rows[0]


def test_training_on_rollouts(folder, tmp_path):
  rows = trained(folder, "rollouts", tmp_path / "run", on=config.loss("policy_gradient", clip=1e9))
  assert all(np.isfinite(row["on"]) for row in rows)
  with pytest.raises(InputError, match="losses.on needs the behaviour_logp of texts that the stud"):
    trained(folder, "records", tmp_path / "refused", on=config.loss("policy_gradient"))


def test_generate_records_the_same_probabilities_with_and_without_distributions(tmp_path):
  write_lines(tmp_path / "prompts.jsonl", [{"prompt": "3 times 6 is"}, {"prompt": "hello"}])
  stores = {}
  for kind in ("sampled", "labels"):
    c = tiny.tiny(tmp_path)
    c.teacher.source, c.records.kind, c.data.seq_len = "", kind, 64
    c.generate.update(prompts=str(tmp_path / "prompts.jsonl"), max_new_tokens=8, cache_len=64)
    c.generate.records_dir = str(tmp_path / kind)
    (tmp_path / f"run-{kind}").mkdir()
    generate.run(config.resolve(c), tmp_path / f"run-{kind}")
    stores[kind] = store.open_store(tmp_path / kind)
  want, got = stores["sampled"][0], stores["labels"][0]
  assert "ids_TK" in want and "ids_TK" not in got and got["mask_T"].sum() == 16
  for name, values in got.items():
    np.testing.assert_array_equal(values, want[name], name)
