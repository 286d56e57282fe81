"""An emulated pod: real processes with small disks behind an object store, against one process."""

import json
import subprocess
import sys

import pod_processes
import pytest
from emulate_pod import MAX_GROWTH, MAX_RATIO, Rig
from launcher import ROOT
from local_stores import Store
from pod_processes import Limits

ROWS = 160  # five shards


@pytest.fixture(scope="module")
def rig():
  """Two processes on one tensor axis, and a bucket of S3 with a packed corpus."""
  with Store("s3") as store:
    found = Rig(store, "tensor", processes=2)
    yield found, found.prepare("small", ROWS)


@pytest.mark.slow
def test_a_pod_that_loses_a_process_records_what_one_process_records(rig, monkeypatch):
  monkeypatch.setattr(pod_processes, "GRACE_SECONDS", 1)
  rig, url = rig
  one, pod, limits = f"{url}/one", f"{url}/pod", Limits()
  rig.step("one: record", ["record"], url, one, "records", 1, None)
  begun = lambda: rig.count(f"{pod}/records", ".array_record.json") >= 2
  rig.step("record, killed", ["record"], url, pod, "records", 2, limits, begun)
  used = rig.step("record, resumed", ["record"], url, pod, "records", 1, limits)
  assert rig.hashes(f"{pod}/records", (".array_record", ".index")) == rig.hashes(
    f"{one}/records", (".array_record", ".index")
  )
  assert all(usage.open_files < limits.open_files for usage in used)
  assert all(usage.disk_bytes < limits.disk_bytes for usage in used)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "fsdp", "data"])
@pytest.mark.parametrize("store", ["s3", "gs"])
def test_a_pod_writes_what_one_process_writes(store, axis):
  growth = ["--growth"] if axis == "data" else []
  command = [sys.executable, ROOT / "tools/emulate_pod.py", f"--store={store}", f"--axis={axis}"]
  done = subprocess.run([*command, *growth], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  result = json.loads(done.stdout)
  assert all(result["digests_equal"].values())
  for ratio in ("record_read_ratio", "weights_read_ratio", "train_read_ratio"):
    assert result.get(ratio, 0) <= MAX_RATIO
  assert all(value <= MAX_GROWTH for value in result["growth"].values())
