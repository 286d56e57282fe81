"""The scores of rounds, computed when they are needed or ahead, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from distill_jax.records.store import Store

Score = Callable[[int, str, Store], Store]  # see Scorer.score
Result = TypeVar("Result")


class RoundScores:
  """The scores of rounds.

  Args:
    score: Scores the texts of one teacher in a round.
    ahead: True to score in a thread as soon as the texts are there, one round after the other.
      The devices must not be needed for it.
  """

  def __init__(self, score: Score, ahead: bool):
    self._score, self._ahead = score, ahead
    self._begun: dict[int, Future[dict[str, Store]]] = {}

  def begin(self, number: int, texts: Mapping[str, Store]) -> None:
    """Begins to score the texts of a round, if scores are computed ahead."""
    if self._ahead and number not in self._begun:
      before = self._begun.get(number - 1)
      self._begun[number] = _in_thread(lambda: self._of_round(number, texts, before))

  def get(self, number: int, texts: Mapping[str, Store]) -> dict[str, Store]:
    """Returns the scores of a round, after waiting for them or computing them.

    Raises:
      InputError, Unavailable, Preempted: See Scorer.score.
    """
    if not self._ahead:
      return self._of_round(number, texts, None)
    return self._begun.pop(number).result()

  def _of_round(
    self, number: int, texts: Mapping[str, Store], before: Future[dict[str, Store]] | None
  ) -> dict[str, Store]:
    if before is not None:
      before.result()
    return {name: self._score(number, name, store) for name, store in texts.items()}


def _in_thread(fn: Callable[[], Result]) -> Future[Result]:
  """Returns the future result of a function, which does not keep the process from ending."""
  future: Future[Result] = Future()

  def run() -> None:
    try:
      future.set_result(fn())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  return future
