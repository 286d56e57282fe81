"""`filter` in several processes, which are killed."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slow
from json_lines import write_lines
from object_stores import upload
from tiny_samples import a_sample

from distill_jax import config, filters, registry
from distill_jax.commands import filter as filter_command
from distill_jax.commands.filter import run as filter_samples
from distill_jax.errors import InputError
from distill_jax.filters import pipeline
from distill_jax.runtime import files
from distill_jax.runtime.workdir import Workdir

FILES, PROMPTS = 6, 30
# A filter that notes its process, awaits `together` such notes, waits some time, and
# kills its process at a text if a file does not exist.
FILTER = """
import dataclasses, os, time
from pathlib import Path
from distill_jax.filters import SampleFilter

@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  folder: str = ""
  seconds: float = 0.0
  at: str = ""
  together: int = 0

  def reject_reason(self, sample):
    (Path(self.folder) / f"pid-{os.getpid()}").touch()
    for _ in range(600):
      if len(list(Path(self.folder).glob("pid-*"))) >= self.together:
        break
      time.sleep(0.1)
    time.sleep(self.seconds)
    if self.at and sample["text"] == self.at:
      (Path(self.folder) / "killed").open("a").write("x")
      if not (Path(self.folder) / "spared").exists():
        (Path(self.folder) / "spared").touch(exist_ok=self.seconds == 0)
        os.kill(os.getpid(), 9)
    return "odd" if sample["id"] % 2 else None
"""
CONFIG = """
from distill_jax import config, registry
registry.add_folder("filters", {folder!r})

def get_config():
  c = config.base()
  c.filter.samples, c.filter.workers = {samples!r}, 2
  c.filters.slow = config.filter("slow_filter", folder={notes!r}, seconds=0.02)
  return c
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Returns a folder with a filter, samples in FILES files, and notes of the filter."""
  for name in ("filters", "samples", "notes"):
    (tmp_path / name).mkdir()
  (tmp_path / "filters/slow_filter.py").write_text(FILTER)
  for i in range(FILES):
    rows = [a_sample(f"text {n}", id=n) for n in range(i * PROMPTS, (i + 1) * PROMPTS)]
    write_lines(tmp_path / f"samples/{i}.jsonl", rows)
  monkeypatch.setattr(filters, "__path__", [*filters.__path__])
  registry.add_folder("filters", tmp_path / "filters")
  yield tmp_path
  sys.modules.pop("distill_jax.filters.slow_filter", None)


def run(folder, workdir, workers=2, **fields):
  c = config.base()
  c.filter.samples, c.filter.workers = str(folder), workers
  c.filters.slow = config.filter("slow_filter", folder=str(folder / "notes"), **fields)
  c.filters.new = config.filter("near_duplicates")
  c.filter.order = ("slow", "new")
  return filter_samples(config.resolve(c), folder / workdir)


def outputs(workdir):
  return {p.parent.name + p.name: p.read_bytes() for p in sorted(Path(workdir).glob("*/*.jsonl"))}


def processes(folder):
  """Returns the processes of the filter that exist."""
  pids = [int(path.name[4:]) for path in (folder / "notes").glob("pid-*")]
  return [pid for pid in pids if Path(f"/proc/{pid}").exists() and pid != os.getpid()]


def test_several_processes_write_what_one_writes(folder):
  one, two = run(folder, "one", workers=1), run(folder, "two", together=3)
  assert one == two and 0 < one["kept"] < one["samples"] == FILES * PROMPTS
  assert outputs(folder / "one") == outputs(folder / "two") and len(outputs(folder / "two")) == 12
  assert not processes(folder)
  assert len(list((folder / "notes").glob("pid-*"))) == 3  # this process, and two others


def test_the_work_of_a_killed_process_is_repeated(folder, capfd):
  want = run(folder, "one", workers=1)
  assert run(folder, "two", at="text 70") == want
  assert outputs(folder / "one") == outputs(folder / "two")
  assert capfd.readouterr().err.count("a worker process was killed; its work is repeated") == 1


def test_samples_that_kill_every_process_are_an_error_and_others_are_kept(folder, monkeypatch):
  monkeypatch.setattr(pipeline, "MIN_BLOCK", 2**12)
  source = (folder / "filters/slow_filter.py").read_text()
  always = source.replace('not (Path(self.folder) / "spared").exists()', "True")
  (folder / "filters/slow_filter.py").write_text(always)
  with pytest.raises(
    InputError, match="filter.workers is 2; .*killed 3 times. Set it to a smaller"
  ):
    run(folder, "two", at="text 170")
  finished = {path.name for path in (folder / "two/verdicts").glob("*.npz")}
  assert "00005.npz" not in finished and len(finished) >= FILES - 2  # the other worker ends, too
  assert not processes(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, slow.param(signal.SIGTERM)])
def test_a_killed_command_leaves_no_process_and_continues(folder, number):
  (folder / "config.py").write_text(
    CONFIG.format(folder=str(folder / "filters"), samples=str(folder), notes=str(folder / "notes"))
  )
  command = [sys.executable, "-m", "distill_jax.cli", "filter", f"--config={folder}/config.py"]
  command += [f"--workdir={folder}/work", "--json"]
  started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
  deadline = time.monotonic() + 120
  while not list((folder / "work").glob("verdicts/*.npz")) and time.monotonic() < deadline:
    assert started.poll() is None
    time.sleep(0.02)
  if number == signal.SIGTERM:
    os.killpg(started.pid, number)  # as a scheduler does
    _, error = started.communicate(timeout=60)
    assert started.returncode == 75 and "segments that it has finished are kept" in error
  else:
    started.kill()
    started.communicate(timeout=60)
  while (left := processes(folder)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not left
  before = {p.name: p.stat().st_mtime_ns for p in (folder / "work/verdicts").glob("*.npz")}
  assert 0 < len(before) < FILES
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  result = json.loads(done.stdout.splitlines()[-1])
  c = config.base()
  c.filter.samples, c.filter.workers = str(folder), 1
  c.filters.slow = config.filter("slow_filter", folder=str(folder / "notes"), seconds=0.02)
  assert result == filter_samples(config.resolve(c), folder / "one")
  assert outputs(folder / "work") == outputs(folder / "one")
  assert not list((folder / "work").glob(".*part"))


def test_slices_share_a_workdir_and_the_whole_run_has_it_alone(folder):
  c = config.base()
  whole = config.resolve(c)
  slices = []
  for text in ("0/2", "1/2"):
    c.filter.slice = text
    slices.append((config.resolve(c), filter_command.part(config.resolve(c))))
  with Workdir(folder / "work", *slices[0]), Workdir(folder / "work", *slices[1]):
    for resolved, part in ((whole, ""), slices[0]):
      with pytest.raises(InputError, match="in use by another process"):
        Workdir(folder / "work", resolved, part).__enter__()
  with Workdir(folder / "work", whole), pytest.raises(InputError, match="in use by another"):
    Workdir(folder / "work", *slices[0]).__enter__()


@pytest.mark.slow
def test_slices_at_a_store_that_fails_at_times(folder, s3):
  """Two calls at the same time in one workdir at a URL, then the call that merges them."""
  upload(folder / "samples", f"{s3.url}/samples")
  (folder / "config.py").write_text(
    CONFIG.format(
      folder=str(folder / "filters"), samples=f"{s3.url}/samples", notes=str(folder / "notes")
    )
  )

  def start(*options):
    command = [sys.executable, "-m", "distill_jax.cli", "filter", f"--config={folder}/config.py"]
    command += [f"--workdir={s3.url}/work", "--json", *options]
    environment = os.environ | s3.environment() | {"DISTILL_JAX_CACHE": str(folder / "cache")}
    return subprocess.Popen(
      command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

  numbers = itertools.count(1)
  s3.proxy.fault = lambda method, path: None if next(numbers) % 7 else 503
  slices = [start(f"--config.filter.slice={i}/2") for i in range(2)]
  for command in slices:
    out, error = command.communicate(timeout=200)
    assert command.returncode == 0, error
    assert json.loads(out.splitlines()[-1])["samples"] == FILES * PROMPTS // 2
  out, error = start().communicate(timeout=200)
  c = config.base()
  c.filter.samples, c.filter.workers = str(folder), 1
  c.filters.slow = config.filter("slow_filter", folder=str(folder / "notes"), seconds=0.02)
  assert json.loads(out.splitlines()[-1]) == filter_samples(config.resolve(c), folder / "one"), (
    error
  )
  for name, data in outputs(folder / "one").items():
    kind, number = name[:-11], name[-11:]
    assert files.read(files.join(s3.url, f"work/{kind}/{number}")) == data
  assert files.listing(f"{s3.url}/work/verdicts") == {}
  assert "filter.json" in files.listing(f"{s3.url}/work")


def test_a_process_of_the_pool_does_not_import_jax():
  code = (
    "import sys\nfrom distill_jax import registry\nfrom distill_jax.filters import _judge\n"
    "from distill_jax.runtime import worker_pool\n"
    "for name in registry.names('filters'): registry.load('filters', name)\n"
    "assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
