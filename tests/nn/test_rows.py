"""Tests of the rows of a batch that processes hold, on meshes of real and made-up machines."""

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.nn import sharding
from distill_jax.records import batch_plan, collate

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Device:
  """A device of another machine, as far as meshes look at it."""

  id: int
  process_index: int
  slice_index: int = 0
  platform: str = "gpu"
  device_kind: str = "NVIDIA H100"


def processes_of(mesh, size):
  """Returns the rows of each process."""
  count = len({d.process_index for d in mesh.devices.flat})
  return [sharding.rows(mesh, size, p) for p in range(count)]


def check(mesh, size):
  """Checks what holds on every mesh; returns the rows of each process."""
  rows = processes_of(mesh, size)
  np.testing.assert_array_equal(np.sort(np.concatenate([r.written for r in rows])), np.arange(size))
  groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
  for r in rows:
    np.testing.assert_array_equal(r.writer_B, rows[0].writer_B)
    assert set(r.written) <= set(r.held)
    mine = [any(d.process_index == r.process for d in group) for group in groups]
    np.testing.assert_array_equal(r.held, np.flatnonzero(np.repeat(mine, size // len(groups))))
  assert len(rows[0].written)  # process 0 shows the progress
  return rows


TPU = """
from distill_jax.preflight import topology
topology.prepare()
import json, sys
from distill_jax.nn import sharding
from distill_jax.nn.sharding import MeshOptions
found = {}
for shape in json.loads(sys.argv[1]):
  mesh = topology.make_mesh(MeshOptions(*shape), "v5p:4x4x4")
  rows = [sharding.rows(mesh, 64, p) for p in range(16)]
  found[str(shape)] = [(r.held.tolist(), r.written.tolist(), r.writer_B.tolist()) for r in rows]
print(json.dumps(found))
"""
POD = {  # mesh: (number of 64 rows that each of the 16 hosts holds, number of hosts that write)
  (1, 16, 4): (8, 16),  # configs/r1_record.py
  (16, 1, 4): (8, 16),
  (1, 8, 8): (8, 8),
  (8, 1, 8): (8, 8),
  (1, 1, 64): (64, 1),
  (2, 32, 1): (4, 16),  # configs/r1_qwen_7b.py
  (1, 32, 2): (4, 16),
  (1, 4, 1, 16): (16, 4),  # configs/r1_qwen_7b.py:131072
}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_rows_of_the_hosts_of_a_pod():
  """On libtpu's v5p:4x4x4, the tensor axis crosses hosts, and a host has parts of two groups."""
  line = [sys.executable, "-c", TPU, json.dumps(list(POD))]
  done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  for shape, (held, writers) in POD.items():
    hosts = found[str(list(shape))]
    assert [len(own) for own, _, _ in hosts] == [held] * 16, shape
    assert sorted(i for _, own, _ in hosts for i in own) == list(range(64)), shape
    assert all(set(own) <= set(all_) for all_, own, _ in hosts)
    assert all(writer_B == hosts[0][2] for _, _, writer_B in hosts)
    assert (
      sorted(len(own) for _, own, _ in hosts) == [0] * (16 - writers) + [64 // writers] * writers
    )


@pytest.mark.parametrize("shape", [(4, 8, 1), (1, 32, 1), (1, 8, 4), (1, 1, 32), (2, 1, 16)])
def test_any_mesh_spans_nodes_of_gpus(shape):
  """Four nodes of 8 GPUs, a process per GPU; slice_index is the number of the node."""
  devices = [Device(i, i, i // 8) for i in range(32)]
  mesh = sharding.make_mesh(*shape, devices=devices[::-1])
  assert [d.id for d in mesh.devices.flat] == list(range(32))
  rows = check(mesh, 64)
  assert sum(len(r.written) > 0 for r in rows) == shape[0] * shape[1]


def test_the_advertised_job_on_four_nodes_passes_its_checks(monkeypatch):
  """The job is `sbatch --nodes=4 launch/slurm.sbatch train --config=configs/r1_qwen_7b.py`."""
  devices = [Device(i, i, i // 8) for i in range(32)]
  monkeypatch.syspath_prepend(ROOT / "configs")
  c = config.resolve(importlib.import_module("r1_qwen_7b").get_config())
  mesh = c.mesh.make(devices)
  assert dict(mesh.shape) == {"data": 1, "fsdp": 32, "context": 1, "tensor": 1}
  sharding.check_batch("train.batch_size", c.train.batch_size, mesh, c.optim.accumulate)
  check(mesh, c.train.batch_size)


def test_only_the_data_axis_spans_slices_of_tpus():
  devices = [Device(i, i // 2, i // 4, "tpu", "TPU") for i in range(8)]
  with pytest.raises(InputError, match="mesh.data is 1; expected a multiple of 2"):
    sharding.make_mesh(fsdp=8, devices=devices)


def test_uneven_layouts():
  """Two processes of three devices: the groups of a tensor axis of 2 are not whole processes."""
  devices = [Device(i, i // 3) for i in range(6)]
  rows = check(sharding.make_mesh(fsdp=3, tensor=2, devices=devices), 6)
  assert [r.held.tolist() for r in rows] == [[0, 1, 2, 3], [2, 3, 4, 5]]
  assert [r.written.tolist() for r in rows] == [[0, 1], [2, 3, 4, 5]]
  odd = [Device(0, 0), Device(1, 0), Device(2, 0), Device(3, 1)]  # three devices and one
  rows = check(sharding.make_mesh(fsdp=4, devices=odd), 8)
  assert [len(r.held) for r in rows] == [6, 2]


def test_a_plan_records_each_row_once_and_alike_on_all_processes():
  """Each of the processes that write has whole shards; the others read along."""
  devices = [Device(i, i // 2) for i in range(8)]
  mesh = sharding.make_mesh(fsdp=2, tensor=4, devices=devices)
  shards = [range(5), range(5, 10), range(10, 12)]
  plans = []
  for rows in check(mesh, 4):
    divided = batch_plan.divide(shards, rows)
    plans.append(np.stack(list(batch_plan.batches(divided, rows))))
    own = plans[-1][:, rows.written]
    own = own[own != batch_plan.PADDING].tolist()
    assert own == [i for shard in divided.get(rows.process, []) for i in shard]
  assert all(np.array_equal(plan, plans[0]) for plan in plans)
  assert sorted(plans[0][plans[0] >= 0]) == list(range(12))
  assert plans[0].shape == (4, 4)  # the writer of 0-4 and 10-11 needs four batches of two


def test_batches_on_devices_have_the_rows_in_order():
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  rows = sharding.rows(mesh, 6)
  x = np.arange(12.0).reshape(6, 2)
  y = collate.to_device(x, rows)
  np.testing.assert_array_equal(y, x)
  assert y.sharding == sharding.batch_sharding(mesh)
  for some in ([0, 1, 2, 3, 4, 5], [2, 3], [0, 5], [4]):
    np.testing.assert_array_equal(collate.local_rows(y, np.array(some)), x[some])


def test_a_wrong_number_of_rows_is_refused():
  rows = sharding.rows(sharding.make_mesh(), 8)
  with pytest.raises(InputError, match="Process 0 has 4 rows of a batch of 8; expected the 8 rows"):
    collate.to_device({"x": np.zeros((4, 2))}, rows)


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1)])
def test_one_process_holds_and_writes_all_rows(shape):
  (rows,) = check(sharding.make_mesh(*shape, devices=jax.devices()[:4]), 8)
  assert rows.held.tolist() == rows.written.tolist() == list(range(8))
