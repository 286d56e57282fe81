"""tools/cross_tokenizer_evidence.py: the rates it tries, and that no run is repeated."""

import cross_tokenizer_evidence as evidence
import pytest


class Fake(evidence.Evidence):
  """Runs whose bits per byte are lowest at one rate."""

  def __init__(self, folder, best):
    super().__init__(folder)
    self.best, self.made = best, []

  def run(self, target, rate, seed):
    if found := self.results.done.get((target, rate, seed)):
      return found["bits_per_byte"]
    self.made.append(rate)
    bits = 1 + abs(evidence.RATES.index(rate) - self.best)
    self.results.write(target=target, rate=rate, seed=seed, bits_per_byte=bits)
    return bits


@pytest.mark.parametrize("best", range(len(evidence.RATES)))
def test_both_neighbours_of_the_best_rate_are_tried_and_nothing_twice(tmp_path, best):
  first = Fake(tmp_path, best)
  assert first.tune("hard") == evidence.RATES[best]
  near = evidence.RATES[max(best - 1, 0) : best + 2]
  assert {*near, evidence.settings().RATES["hard"]} <= set(first.made)
  assert len(first.made) == len(set(first.made))
  again = Fake(tmp_path, best)
  assert again.tune("hard") == evidence.RATES[best] and not again.made


def test_the_table_has_the_best_rate_and_the_share_of_the_gain():
  bits = {"same_hard": 1.4, "same_soft": 1.2, "hard": 1.5, "retargeted": 1.34}
  results = [
    {"target": target, "rate": rate, "seed": seed, "bits_per_byte": b + worse + 0.01 * seed}
    for target, b in bits.items()
    for rate, worse in ((3e-4, 0.1), (6e-4, 0.0))
    for seed in (0, 1, 2)
    if seed == 0 or not worse
  ]
  lines = evidence.table(evidence.best_rates(results)).splitlines()
  assert lines[2] == (
    "| same_hard | 0.0006 (0.0003: 1.500, 0.0006: 1.400) | 1.410 | 1.400, 1.410, 1.420 |"
  )
  assert lines[-1] == "retargeted: 80% of the gain"
