"""Tests of checkpoints: exact restoring on any mesh, and errors for damaged files."""

import errno
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.errors import InputError, Unavailable
from distill_jax.nn import sharding
from distill_jax.runtime import checkpoint

ABOUT = {"records": ["abc"]}


def state(seed: int = 0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    "params": {
      "a": jax.random.normal(keys[0], (64, 32)),
      "b": jax.random.normal(keys[1], (16,)).astype(jnp.bfloat16),
    },
    "opt": {"count": jnp.int32(7), "m": jax.random.normal(keys[2], (8, 4, 4))},
  }


def abstract(tree, mesh=None, *axes):
  where = NamedSharding(mesh or sharding.make_mesh(), PartitionSpec(*axes))
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where if x.ndim else None)
  return jax.tree.map(put, tree)


def assert_equal(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  with checkpoint.manager(folder, keep=3) as saves:
    for step in (1, 2):
      checkpoint.save(saves, step, state(step), ABOUT)
  return folder


def test_a_state_is_restored_on_another_mesh(saved):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  with checkpoint.manager(saved) as saves:
    like = abstract(state(), mesh, ("fsdp", "tensor"))
    assert_equal(checkpoint.restore(saves, like, ABOUT), state(2))
    assert_equal(checkpoint.restore(saves, like, ABOUT, 1), state(1))
  assert_equal(checkpoint.restore_params(saved, abstract(state()["params"])), state(2)["params"])


@pytest.mark.filterwarnings("ignore")  # orbax does not await its coroutines after an error
def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(saved, tmp_path):
  """Flips eight bytes of every file of the checkpoint; errors name the previous checkpoint."""
  files = [p for p in sorted((saved / "checkpoints" / "2").rglob("*")) if p.is_file()]
  rng, found = random.Random(0), {}
  for n, file in enumerate(files):
    raw = file.read_bytes()
    name = str(file.relative_to(saved / "checkpoints" / "2"))
    for at in [rng.randrange(len(raw)) for _ in range(8 if raw else 0)]:
      run = tmp_path / f"{n}"
      shutil.copytree(saved, run)
      broken = bytearray(raw)
      broken[at] ^= 1 << rng.randrange(8)
      (run / "checkpoints" / "2" / name).write_bytes(broken)
      with checkpoint.manager(run) as saves:
        try:
          assert_equal(checkpoint.restore(saves, abstract(state()), ABOUT), state(2))
        except InputError as e:
          assert "checkpoints/2" in str(e)
          assert "Move that folder away to resume from checkpoint 1" in str(e)
          found[name] = found.get(name, 0) + 1
      shutil.rmtree(run)
  data = {name: n for name, n in found.items() if "/d/" in name}
  assert data and found["about/metadata"] == 8, found


def test_a_flipped_byte_of_tensor_data_is_named(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "run")
  where = tmp_path / "run" / "checkpoints" / "2" / "state"
  for file in where.rglob("d/*"):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    file.write_bytes(raw)
  with checkpoint.manager(tmp_path / "run") as saves, pytest.raises(InputError, match="is damaged"):
    checkpoint.restore(saves, abstract(state()), ABOUT)


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError("403: credentials have expired"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes."),
    ValueError('UNAVAILABLE: Error reading "manifest.ocdbt"'),
  ],
)
def test_an_error_that_an_intact_checkpoint_can_have_is_not_reported_as_damage(saved, error):
  """Moving it away, as for a damaged one, would lose a run."""
  with (
    checkpoint.manager(saved) as saves,
    pytest.raises(type(error)) as raised,
    checkpoint.reading(saves, 2),
  ):
    raise error
  assert raised.value is error


DOWN = [
  ValueError('UNAVAILABLE: Error writing "d/1f": HTTP response code: 503'),
  ValueError("RESOURCE_EXHAUSTED: Too many requests"),
  RuntimeError("DEADLINE_EXCEEDED: Barrier timed out."),  # on processes that wait for another
  ConnectionResetError("Connection reset by peer"),
]
REFUSED = [
  ValueError("PERMISSION_DENIED: storage.objects.create access"),
  OSError("Forbidden: https://storage.googleapis.com/b"),
]


def raised_at(url, error, context, *args):
  """Returns the error that a block of a context manager for a checkpoint ends with."""
  saves = types.SimpleNamespace(directory=epath.Path(url), all_steps=lambda: [1])
  with pytest.raises(Exception) as raised, context(saves, *args):  # noqa: B017
    raise error
  return raised.value


@pytest.mark.parametrize("is_cause", [False, True])
@pytest.mark.parametrize(
  ("error", "kind"), [*((e, Unavailable) for e in DOWN), *((e, InputError) for e in REFUSED)]
)
def test_a_store_that_is_down_or_refuses_access(error, kind, is_cause):
  """Launchers run a command again after Unavailable, and end it after InputError."""
  if is_cause:
    cause, error = error, ValueError("The save has failed.")
    error.__cause__ = cause
  writing = raised_at("gs://b/checkpoints", error, checkpoint._writing)
  reading = raised_at("gs://b/checkpoints", error, checkpoint.reading, 1)
  assert type(writing) is kind and type(reading) is kind
  assert "A checkpoint cannot be written to gs://b/checkpoints" in str(writing)
  assert "Checkpoint gs://b/checkpoints/1 cannot be read" in str(reading)
  assert "damaged" not in str(reading) and "Free space" not in str(writing)


def test_other_errors_at_a_url_are_as_on_a_disk():
  for error in (ValueError("DATA_LOSS: crc32c differs"), KeyError("arrays")):
    found = raised_at("gs://b/checkpoints", error, checkpoint.reading, 1)
    assert type(found) is InputError and "is damaged" in str(found)
  memory = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes.")
  assert raised_at("gs://b/checkpoints", memory, checkpoint.reading, 1) is memory
  full = ValueError("UNAVAILABLE: No space left")
  assert "Free space" in str(raised_at("/runs/x/checkpoints", full, checkpoint._writing))


def test_another_model_other_records_and_no_checkpoint_are_refused(saved, tmp_path):
  other = state()
  other["params"]["a"] = jnp.zeros((64, 48))
  with checkpoint.manager(saved) as saves:
    with pytest.raises(
      InputError, match=r"of another model: params\.a is float32\[64, 32\] in the"
    ):
      checkpoint.restore(saves, abstract(other), ABOUT)
    with pytest.raises(InputError, match="was saved with records .'abc'., but this run has .'xyz'"):
      checkpoint.restore(saves, abstract(state()), {"records": ["xyz"]})
    with pytest.raises(InputError, match=r"has no checkpoint 5; its checkpoints are \[1, 2\]"):
      checkpoint.restore(saves, abstract(state()), ABOUT, 5)
    with pytest.raises(InputError, match="Checkpoint 2 exists in"):
      checkpoint.save(saves, 2, state(), ABOUT)
  with pytest.raises(InputError, match="does not hold checkpoints"):
    checkpoint.restore_params(tmp_path, abstract(state()["params"]))


def test_the_last_and_every_third_are_kept(tmp_path):
  with checkpoint.manager(tmp_path, keep=2, every=3) as saves:
    for step in range(1, 9):
      checkpoint.save(saves, step, {"x": jnp.float32(step)}, ABOUT)
    saves.wait_until_finished()
    assert sorted(saves.all_steps()) == [3, 6, 7, 8]


FULL = """
import jax, resource, sys, jax.numpy as jnp
from pathlib import Path
from distill_jax.runtime import checkpoint
from distill_jax.errors import InputError
with checkpoint.manager(Path(sys.argv[1]), keep=2) as saves:
  checkpoint.save(saves, 1, {"x": jnp.arange(10)}, {})
  checkpoint.wait(saves)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
  try:
    checkpoint.save(saves, 2, {"x": jax.random.normal(jax.random.key(0), (10_000, 10))}, {})
    checkpoint.wait(saves)
  except InputError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
  """A limit of 100 kB per file replaces a full disk: the system raises a similar error."""
  line = [sys.executable, "-c", FULL, str(tmp_path)]
  done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2])
  assert "A checkpoint cannot be written to" in done.stdout, done.stderr
  assert "File too large" in done.stdout
  with checkpoint.manager(tmp_path) as saves:
    assert sorted(saves.all_steps()) == [1]
    got = checkpoint.restore(saves, abstract({"x": jnp.arange(10)}), {})
  np.testing.assert_array_equal(got["x"], np.arange(10))


SAVER = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from distill_jax.runtime import checkpoint
with checkpoint.manager(Path(sys.argv[1]), keep=2) as saves:
  first = (saves.latest_step() or 0) + 1
  print("ready", flush=True)
  for step in range(first, first + 1000):
    x = jnp.full((2000, 500), step, jnp.float32)
    checkpoint.save(saves, step, {"x": x, "y": x + 1}, {})
"""


@pytest.mark.slow
def test_kills_at_random_moments_of_a_save_leave_a_valid_checkpoint(tmp_path):
  """After each of twenty kills with -9, the last checkpoint is complete and exact."""
  rng, last = random.Random(0), 0
  for _ in range(20):
    with subprocess.Popen(
      [sys.executable, "-c", SAVER, str(tmp_path)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=Path(__file__).parents[2],
    ) as child:
      assert child.stdout.readline() == "ready\n"
      time.sleep(rng.uniform(0.2, 1.5))
      child.send_signal(signal.SIGKILL)
    with checkpoint.manager(tmp_path) as saves:
      step = saves.latest_step() or 0
      assert step >= last
      if step:
        like = abstract({"x": jnp.zeros((2000, 500)), "y": jnp.zeros((2000, 500))})
        got = checkpoint.restore(saves, like, {})
        assert float(got["x"].min()) == float(got["x"].max()) == step
        assert float(got["y"].max()) == step + 1
      last = step
  assert last > 20  # some processes saved more than once
