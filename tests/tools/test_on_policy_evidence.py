"""tools/on_policy_evidence.py: what it tries, keeps and repeats, and the table."""

import json

import on_policy_evidence as evidence
import pytest
from on_policy_table import HELDOUT, OWN, TRAINED, VALIDATION, table

CONFIG = evidence.ROOT / "configs" / "running_sums.py"
FIRST = evidence.experiments.load_config(CONFIG).RATES["live"]


class Fake(evidence.Evidence):
  """Runs that take no time, of which one rate is the best."""

  def __init__(self, folder, best):
    super().__init__(folder, CONFIG)
    self.best, self.made = best, []

  def command(self, verb, target, workdir, *flags):
    self.made.append((verb, str(workdir)))
    (self.folder / workdir / "checkpoints").mkdir(parents=True)

  def train(self, target, rate, seed):
    if found := self.results.done.get((TRAINED, target, rate, seed)):
      return found
    run = f"{target}-{rate:g}-{seed}"
    self.command("train", target, run)
    return self.results.write(what=TRAINED, target=target, rate=rate, seed=seed, run=run)

  def measure(self, what, target, rate, seed, run):
    if found := self.results.done.get((what, target, rate, seed)):
      return found
    assert (self.folder / run / "checkpoints").exists(), f"{run} cannot be measured any more"
    score = 1 - 0.1 * abs(evidence.RATES.index(rate) - self.best)
    number = {"value": score, "low": score, "high": score}
    return self.results.write(
      what=what, target=target, rate=rate, seed=seed, run=run, **{"pass@1": number}
    )


@pytest.mark.parametrize("best", range(len(evidence.RATES)))
def test_both_neighbours_of_the_best_rate_are_tried_and_its_checkpoints_alone_are_kept(
  tmp_path, best
):
  first = Fake(tmp_path, best)
  assert first.tune("live") == evidence.RATES[best]
  near = evidence.RATES[max(best - 1, 0) : best + 2]
  made = [run for _, run in first.made]
  assert {f"live-{rate:g}-0" for rate in (*near, FIRST)} <= set(made)
  assert len(made) == len(set(made))
  kept = [path.parent.name for path in tmp_path.glob("*/checkpoints")]
  assert kept == [f"live-{evidence.RATES[best]:g}-0"]

  again = Fake(tmp_path, best)
  assert again.tune("live") == evidence.RATES[best]
  for seed in (0, 1):
    again.final("live", evidence.RATES[best], seed)
  assert [run for _, run in again.made] == [f"live-{evidence.RATES[best]:g}-1"]
  assert not list(tmp_path.glob("*/checkpoints"))


def test_equal_rates_keep_the_checkpoints_of_the_rate_that_is_chosen(tmp_path):
  made = Fake(tmp_path, 0)
  made.best = evidence.RATES.index(FIRST) - 0.5  # the first rate and the one below are equal
  assert made.tune("live") == evidence.RATES[evidence.RATES.index(FIRST) - 1]
  made.final("live", evidence.RATES[evidence.RATES.index(FIRST) - 1], 0)


def test_a_finished_command_is_not_run_again_and_an_unfinished_one_is(tmp_path):
  first = Fake(tmp_path, 0)
  first.prepare()
  prepared = [(verb, folder) for verb, _, folder in first.settings.PREPARE]
  assert first.made == prepared
  assert (tmp_path / first.settings.PROBLEMS[1] / "practice.jsonl").exists()
  (tmp_path / f"{prepared[-1][1]}.finished").unlink()
  (tmp_path / prepared[-1][1] / "checkpoints").rmdir()
  again = Fake(tmp_path, 0)
  again.prepare()
  assert again.made == prepared[-1:]


def test_a_step_that_compiles_counts_as_the_others(tmp_path):
  rows = [
    {"step": 0, "tokens": 5, "step_seconds": 0.0, "generate_seconds": 2.0, "score_seconds": 1.0},
    {"step": 1, "tokens": 7, "step_seconds": 3.0},
    {"step": 2, "tokens": 7, "step_seconds": 90.0, "generate_seconds": 3.0, "score_seconds": 1.0},
    {"step": 3, "tokens": 7, "step_seconds": 2.0},
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = evidence.training_of(tmp_path)
  assert found["tokens"] == 26 and found["steps"] == 4
  assert found["seconds"] == {"train": 12.0, "generate": 5.0, "score": 2.0}


def test_the_table_has_the_means_of_seeds_and_paired_differences():
  def line(what, target, rate, seed, **values):
    return {"what": what, "target": target, "rate": rate, "seed": seed, **values}

  def held(target, rate, seed, right):
    values = {str(i): x for i, x in enumerate(right)}
    number = {"value": sum(right) / len(right)}
    values = {"right": values, "majority": values, "pass@1": number, "cut_off": 0.25}
    return line(HELDOUT, target, rate, seed, **values)

  seconds = {"train": 10.0, "generate": 20.0, "score": 0.0}
  results = [
    held("start", 0.0, 0, [0.0, 0.5]),
    line(VALIDATION, "live", 1e-4, 0, **{"pass@1": {"value": 0.25}}),
    line(VALIDATION, "live", 2e-4, 0, **{"pass@1": {"value": 0.75}}),
  ]
  for seed, right in enumerate(([0.5, 1.0], [0.75, 1.0])):
    results.append(line(TRAINED, "live", 2e-4, seed, tokens=1000 + seed * 200, seconds=seconds))
    results.append(held("live", 2e-4, seed, right))
    results.append(held("supervised", 1e-4, seed, [x - 0.25 for x in right]))
    results.append(line(OWN, "live", 2e-4, seed, kl=0.125 + seed / 4))
  lines = table(results).splitlines()
  live = next(x for x in lines if x.startswith("| live"))
  assert live == (
    "| live | 0.0002 (0.0001: 25.0%, 0.0002: 75.0%) | 1,100 | 81.2% (62.5 to 100.0) | "
    "75.0%, 87.5% | 81.2% (62.5 to 100.0) | 25.0% | 0.250: 0.125, 0.375 | 10, 20, 0 |"
  )
  assert "live - start, pass@1: 56.2% (50.0 to 62.5)" in lines  # both seeds of `live`
  assert "live - supervised, pass@1: 25.0% (25.0 to 25.0)" in lines
