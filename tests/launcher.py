"""Runs the scripts of launch/ as a person does."""

import contextlib
import importlib.util
import io
import os
import stat
import subprocess
import sys
from pathlib import Path
from unittest import mock

from absl.flags import FLAGS

ROOT = Path(__file__).parents[1]
NASTY = [
  "a b",
  "$(touch x)",
  "`touch x`",
  "; touch x",
  "'",
  '"',
  "&& touch x",
  "$HOME",
  "*",
  "#",
  "a: b",
  "",
  "\\",
  "!!",
  "ü",
]
VERB = ["train", "--config=configs/r1_qwen_7b.py", *[f"--config.data.path={v}" for v in NASTY]]


def run(line, env=None, code=0, cwd=ROOT):
  done = subprocess.run(
    [str(x) for x in line],
    capture_output=True,
    text=True,
    cwd=cwd,
    env=os.environ | (env or {}),
    timeout=60,
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done


def launcher(name):
  """A script's main(), called here as its command would be: a start of jax is slow."""
  sys.path.append(str(ROOT / "launch"))  # as for a script
  spec = importlib.util.spec_from_file_location(name, ROOT / f"launch/{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def call(*flags, env=None, code=0, cwd=ROOT):
    out, err, ended = io.StringIO(), io.StringIO(), 0
    FLAGS["workdir"].unparse()  # of an earlier call; a process has one command line
    with (
      contextlib.chdir(cwd),
      mock.patch("tempfile.tempdir", str(cwd)),  # where the archive goes
      mock.patch.dict(os.environ, env or {}),
      mock.patch("sys.argv", [name, *map(str, flags)]),  # ml_collections reads overrides there
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
    ):
      try:
        module.main([str(f) for f in flags])
      except SystemExit as e:
        ended = e.code
        if isinstance(ended, str):  # as the interpreter does
          print(ended, file=sys.stderr)
          ended = 1
    done = subprocess.CompletedProcess(flags, ended or 0, out.getvalue(), err.getvalue())
    assert done.returncode == code, done.stdout + done.stderr
    return done

  return call


pod, gke = launcher("tpu_pod"), launcher("gke")


def executable(path: Path, text: str) -> Path:
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return path
