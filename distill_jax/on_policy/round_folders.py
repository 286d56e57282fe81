"""The folders of rounds: their places, and the deletion of old ones."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from distill_jax.records.shard_writer import writing
from distill_jax.runtime import distributed, files, storage

FOLDER = "rounds"  # in the folder of a run
DELETED = "deleted"  # file in the folder of a round that is being deleted


class RoundFolders:
  """The folders of a run's rounds.

  Args:
    folder: The folder of the run.
    keep: Number of the last rounds that are kept; 0 for all.
    saves: Number of checkpoints that are kept, besides one that is being written.
  """

  def __init__(self, folder: Path, keep: int, saves: int):
    self._folder, self._keep = folder, keep
    self._needed: collections.deque[Collection[int]] = collections.deque(maxlen=saves + 1)
    self._there: set[int] = set()

  def open(self, start: int, needed_at: Callable[[int], Collection[int]]) -> None:
    """Looks up what an earlier process has left: rounds, and checkpoints that need some of them.

    Args:
      start: The step at which this process begins.
      needed_at: Returns the rounds that a checkpoint before a step needs.
    """
    if self._keep and distributed.is_process_0():
      names = files.folders(files.join(storage.location(self._folder), FOLDER))
      self._there = {int(name) for name in names if name.isdecimal()}
      saved = files.folders(storage.checkpoints(self._folder))
      for step in sorted(int(name) for name in saved if name.isdecimal()):
        if step < start:
          self.protect(needed_at(step))
    self.protect(needed_at(start))

  def protect(self, rounds: Collection[int]) -> None:
    """Keeps the rounds that a new checkpoint needs until later ones replace it."""
    self._needed.append(rounds)

  def delete_before(self, number: int) -> None:
    """Deletes what a run does not need any more once the texts of a round are there.

    All processes call it.

    Raises:
      Unavailable: A URL cannot be written.
    """
    self._there.add(number)
    if self._keep:
      distributed.run_on_process_0(lambda: self._delete_before(number))

  def _delete_before(self, number: int) -> None:
    needed = {i for rounds in self._needed for i in rounds}
    for old in sorted(i for i in self._there - needed if i <= number - self._keep):
      delete(folder_of(self._folder, old))
      self._there.remove(old)


def folder_of(folder: Path, number: int, teacher: str = "") -> Path:
  """Returns the folder of a round in the folder of a run, or that of a teacher's stores in it."""
  return folder / FOLDER / f"{number:05d}" / teacher


def delete(folder: Path) -> None:
  """Deletes the folder of a round. If this is stopped, `is_partly_deleted` shows it."""
  where = storage.location(folder)
  with writing(where):
    files.write(files.join(where, DELETED), b"")
  for name in files.folders(where):  # before the file that marks them
    files.remove_tree(files.join(where, name))
  files.remove_tree(where)
  shutil.rmtree(folder, ignore_errors=True)  # the mirror of a URL


def is_partly_deleted(folder: Path) -> bool:
  """Returns whether the folder of a round is what a stopped `delete` has left of it."""
  return files.info(files.join(storage.location(folder), DELETED)) is not None
