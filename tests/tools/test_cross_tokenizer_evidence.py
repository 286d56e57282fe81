"""tools/cross_tokenizer_evidence.py: the rates it tries, and that no run is repeated."""

import cross_tokenizer_evidence as evidence
import pytest


class Fake(evidence.Evidence):
  """Runs whose bits per byte are lowest at one rate."""

  def __init__(self, folder, best):
    super().__init__(folder)
    self.best, self.made = best, []

  def run(self, target, rate, seed):
    if found := self.done.get((target, rate, seed)):
      return found["bits_per_byte"]
    self.made.append(rate)
    bits = 1 + abs(evidence.RATES.index(rate) - self.best)
    self.write(target=target, rate=rate, seed=seed, bits_per_byte=bits)
    return bits


@pytest.mark.parametrize("best", range(len(evidence.RATES)))
def test_both_neighbours_of_the_best_rate_are_tried_and_nothing_twice(tmp_path, best):
  first = Fake(tmp_path, best)
  assert first.tune("hard") == evidence.RATES[best]
  near = evidence.RATES[max(best - 1, 0) : best + 2]
  assert {*near, first.first_rate("hard")} <= set(first.made)
  assert len(first.made) == len(set(first.made))
  again = Fake(tmp_path, best)
  assert again.tune("hard") == evidence.RATES[best] and not again.made


def test_all_tokenizers_are_measured_on_the_same_bytes():
  pieces = list(evidence.pieces())
  assert max(len(piece.encode()) for piece in pieces) <= evidence.PIECE
  assert sum(len(piece.encode()) for piece in pieces) > 20_000
