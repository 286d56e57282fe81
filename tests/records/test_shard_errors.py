"""A shard that one process cannot write, while all processes compute together."""

from types import SimpleNamespace

import pytest

from distill_jax.errors import InputError
from distill_jax.nn import sharding
from distill_jax.records import batch_plan, job
from distill_jax.runtime import distributed

SHARDS = [range(i, i + 4) for i in range(0, 32, 4)]


class Teacher:
  """A teacher whose batches all processes compute together."""

  on_devices = True

  def __init__(self):
    self.computed = 0

  def recorded(self, corpus, plan, rows, on_statistics):
    for index_B in plan:
      self.computed += 1
      yield index_B, [{}] * len(batch_plan.written(index_B, rows))


def test_a_process_that_cannot_write_computes_until_all_processes_stop(monkeypatch):
  asked, teacher = [], Teacher()

  def write_shard(*_):
    raise InputError("records-00000 cannot be written.")

  monkeypatch.setattr(distributed.Preemption, "request", lambda: asked.append(teacher.computed))
  reached = lambda _: bool(asked) and teacher.computed == asked[0] + 3
  monkeypatch.setattr(distributed.Preemption, "reached", reached)
  writer = SimpleNamespace(folder="store", write_shard=write_shard)
  corpus = SimpleNamespace(positions=1, rows=[])
  part = job.Part(corpus, writer, sharding.rows(sharding.make_mesh(), 4), SHARDS)
  with pytest.raises(InputError, match="records-00000 cannot be written"):
    job._write_on_all_processes("record", part, teacher, SimpleNamespace(add=lambda n: None))
  assert len(asked) == 1 and teacher.computed == asked[0] + 3 < len(SHARDS)
