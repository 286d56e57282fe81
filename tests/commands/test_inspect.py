"""`distill-jax inspect` of a store, without a config."""

import sys

import pytest
import tiny
from tiny_store import record

from distill_jax import cli, config
from distill_jax.errors import InputError
from distill_jax.runtime import config_of_run
from distill_jax.runtime.json_io import write_json


def printed(folder, capsys, monkeypatch, *flags):
  argv = ["distill-jax", "inspect", f"--workdir={folder}", *flags]
  monkeypatch.setattr(sys, "argv", argv)
  capsys.readouterr()
  cli.main(argv)
  return capsys.readouterr().out


def test_a_store_alone(tmp_path, capsys, monkeypatch):
  """Nothing is written, not even the config."""
  record(tmp_path)
  before = sorted(tmp_path.iterdir())
  assert "\nsequences: 10\n" in printed(tmp_path, capsys, monkeypatch)
  key = "--config.inspect.verify=True"
  assert "\nsequences: 10\n" in printed(tmp_path, capsys, monkeypatch, key)
  assert sorted(tmp_path.iterdir()) == before


def test_the_config_is_that_of_the_run(tmp_path, capsys, monkeypatch):
  """With data.buckets, a store is in the folder of its length."""
  c = tiny.tiny(tmp_path)
  c.data.seq_len, c.data.buckets = 32, (16, 32)
  record(tmp_path / "run" / "16")
  write_json(tmp_path / "run" / "config.json", config.to_dict(config.resolve(c)))
  got = config.resolve(config_of_run.get_config(str(tmp_path / "run")))
  assert got == config.resolve(c)
  assert "16/sequences: 10\n" in printed(tmp_path / "run", capsys, monkeypatch)


def test_a_config_of_another_version(tmp_path):
  write_json(tmp_path / "config.json", {"trian": {}})
  with pytest.raises(InputError, match="'trian' is unknown.*Name a config with --config"):
    config_of_run.get_config(str(tmp_path))
