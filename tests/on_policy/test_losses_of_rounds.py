"""Rounds with the losses of realised tokens, from scores of the labels alone."""

import numpy as np
import pytest
import tiny
import tiny_on_policy

from distill_jax import config
from distill_jax.commands import record
from distill_jax.errors import InputError
from distill_jax.records.store import open_store


def scored(folder, kind="labels"):
  """Rounds of two steps with stored scores, so that the second step has moved from its texts."""
  c = tiny_on_policy.on_policy_config(folder)
  c.train.online, c.on_policy.every, c.records.kind = False, 2, kind
  c.losses = {"on": config.loss("policy_gradient"), "k2": config.loss("log_ratio", weight=0.1)}
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with sampled records of other text, to evaluate on."""
  path = tmp_path_factory.mktemp("losses")
  c = tiny.tiny(path)
  c.teacher.source, c.data.sequences, c.data.seq_len = "", 8, tiny_on_policy.LENGTH
  record.run(config.resolve(c), path / "heldout")
  return path


@pytest.mark.slow
def test_scores_of_labels_are_enough_and_other_records_evaluate_the_student(folder, tmp_path):
  c = scored(folder)
  c.train.heldout, c.train.eval_every = (str(folder / "heldout"),), 2
  tiny_on_policy.run(c, tmp_path / "run")
  rows = tiny.measured(tmp_path / "run")
  assert all(np.isfinite([row["on"], row["k2"]]).all() for row in rows)
  last = rows[-1]
  assert last["heldout/kl/teacher"] > 0 and not {"heldout/on", "heldout/loss"} & last.keys()
  found = open_store(tmp_path / "run/rounds/00001/teacher/records")
  assert found.manifest.kind == "labels" and found.manifest.spec.rollout == ("behaviour_logp",)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"records.kind": "sampled", "losses": "reverse"}, "reverse_kl needs exact probabilities"),
    ({"losses": "reverse"}, "reverse_kl compares distributions, but records of kind 'labels'"),
    ({"losses": "reward"}, "losses.it needs the reward of texts .* Set on_policy.reward"),
    ({"records.temperature": 2.0}, "records.temperature is 2.0; expected 1"),
  ],
)
def test_losses_that_the_scores_would_bias_are_refused_before_a_text_is_sampled(
  tmp_path, change, message
):
  c = scored(tmp_path)
  named = {
    "reverse": config.loss("kd", divergence="reverse_kl"),
    "reward": config.loss("policy_gradient", reward_weight=1.0),
  }
  if "losses" in change:
    c.losses = {"it": named[change["losses"]]}
  c.update_from_flattened_dict({k: v for k, v in change.items() if k != "losses"})
  with pytest.raises(InputError, match=message):
    tiny_on_policy.run(c, tmp_path / "run")
  assert not [*(tmp_path / "run").rglob("*.array_record")]
