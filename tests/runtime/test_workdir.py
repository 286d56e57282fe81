"""The folder of a run."""

import json

import pytest

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.runtime.workdir import Workdir, read_config


def a_config(seed):
  c = config.base()
  c.seed = seed
  return config.resolve(c)


def make_run(folder):
  """Makes the folder of a run, and returns the content of its config.json."""
  with Workdir(folder, a_config(seed=1)):
    pass
  return json.loads((folder / "config.json").read_text())


def test_a_refused_command_leaves_the_folder_to_the_corrected_one(tmp_path):
  (tmp_path / "notes.txt").write_text("of the user")
  with pytest.raises(InputError, match="wrong"), Workdir(tmp_path, a_config(seed=1)):
    raise InputError("A key is wrong.")
  assert {p.name for p in tmp_path.iterdir()} == {".lock", "notes.txt"}
  with Workdir(tmp_path, a_config(seed=2)):
    assert (tmp_path / "config.json").exists()


def test_a_refused_part_leaves_the_config_of_the_other_parts(tmp_path):
  """At a URL, a machine sees its own mirror only, and not the other parts."""
  with pytest.raises(InputError, match="wrong"), Workdir(tmp_path, a_config(seed=1), "-0-2"):
    raise InputError("A key is wrong.")
  assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("error", [InputError, FloatingPointError, KeyboardInterrupt])
def test_a_run_that_has_written_something_keeps_its_folder(tmp_path, error):
  with pytest.raises(error), Workdir(tmp_path, a_config(seed=1)) as folder:
    (folder / "metrics.jsonl").write_text("")
    raise error
  with pytest.raises(InputError, match="holds a run with seed=1, but this config has 2"):
    Workdir(tmp_path, a_config(seed=2)).__enter__()


def test_a_crash_keeps_the_config(tmp_path):
  with pytest.raises(RuntimeError), Workdir(tmp_path, a_config(seed=1)):
    raise RuntimeError
  assert (tmp_path / "config.json").exists()


def test_a_refused_command_in_the_folder_of_a_run_changes_nothing(tmp_path):
  with Workdir(tmp_path, a_config(seed=1)):
    pass
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(InputError, match="wrong"), Workdir(tmp_path, a_config(seed=1)):
    raise InputError("A key is wrong.")
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_of_an_earlier_version_continues_and_is_read(tmp_path):
  """Its config.json has shards by sequences, and lacks a key that does not change results."""
  tree = make_run(tmp_path)
  tree["records"]["sequences_per_shard"] = 6
  del tree["records"]["tokens_per_shard"], tree["train"]["checkpoint_minutes"]
  (tmp_path / "config.json").write_text(json.dumps(tree))
  with Workdir(tmp_path, a_config(seed=1)):
    pass
  assert read_config(tmp_path).records.tokens_per_shard == 6 * tree["data"]["seq_len"]


def test_keys_that_an_earlier_version_lacked_have_their_defaults(tmp_path):
  tree = make_run(tmp_path)
  del tree["optim"]["accumulate"]
  (tmp_path / "config.json").write_text(json.dumps(tree))
  with Workdir(tmp_path, a_config(seed=1)):
    pass
  c = config.base()
  c.seed, c.optim.accumulate = 1, 2
  with (
    pytest.raises(InputError, match="holds a run with optim.accumulate=1, but this config has 2"),
    Workdir(tmp_path, config.resolve(c)),
  ):
    pass
  tree["optim"]["removed"] = 3
  (tmp_path / "config.json").write_text(json.dumps(tree))
  with (
    pytest.raises(InputError, match="holds a run with optim.accumulate=None"),
    Workdir(tmp_path, a_config(seed=1)),
  ):
    pass


def test_the_memory_of_decoding_may_change(tmp_path):
  """`generate` may continue with fewer rows; the configs of earlier runs have no `gather`."""
  tree = make_run(tmp_path)
  del tree["generate"]["gather"]
  (tmp_path / "config.json").write_text(json.dumps(tree))
  c = config.base()
  c.seed = 1
  c.generate.batch_size, c.generate.prefill_rows, c.generate.gather = 8, 2, "per_token"
  with Workdir(tmp_path, config.resolve(c)):
    pass
