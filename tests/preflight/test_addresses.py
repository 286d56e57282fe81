"""Files that a command needs on every host of a pod."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.preflight import addresses

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.smoke


def empty():
  """A config without any file."""
  c = config.base()
  c.teacher.shape = c.student.shape = "tiny"
  return c


CHANGES = {  # what a config needs so that the command reads a path, by key
  "train teacher.source": {"train.online": True},
  "train teachers": {"train.online": True},
  "evaluate train.heldout": {"evaluate.heldout": False},
}
PAIRS = [(verb, key) for key, verbs in addresses.KEYS.items() for verb in sorted(verbs)]


@pytest.mark.parametrize("verb, key", PAIRS)
def test_a_path_of_this_machine_is_refused(verb, key, tmp_path):
  changes = CHANGES.get(f"{verb} {key}", {})
  for address, refused in (("gs://bucket/x", False), (str(tmp_path / "x"), True)):
    found = set(addresses._addresses(verb, with_value(key, address, changes)))
    assert [where for where, value in found if value == address] in ([key], [f"{key}.a"])
    with pytest.raises(InputError, match=f"{key}.*; expected a URL") if refused else nullcontext():
      addresses.check(verb, "gs://bucket/run", with_value(key, address, changes), tmp_path)


def with_value(key, address, changes):
  """Returns a config with the address as the value of a key, in the key's type."""
  c = config.resolve(empty())
  for name, value in [*changes.items(), (key, address)]:
    section, _, field = name.partition(".")
    before = getattr(getattr(c, section), field) if field else getattr(c, section)
    if isinstance(before, tuple):
      value = (value,)
    elif isinstance(before, dict):
      value = {"a": (value,) if key.startswith("train.") else value}
    inner = dataclasses.replace(getattr(c, section), **{field: value}) if field else value
    c = dataclasses.replace(c, **{section: inner})
  return c


@pytest.mark.parametrize("verb", sorted(addresses.TASK_VERBS))
def test_the_examples_of_a_task_and_its_tokenizer_are_on_every_host(verb, tmp_path):
  c = empty()
  c.data.path = str(tmp_path / "not read with tasks")
  path = str(tmp_path / "x.jsonl")
  c.tasks.main = config.task("text_classes", path=path, classes=("a", "b"))
  with pytest.raises(InputError, match=r"tasks\.main\.path is .*; expected a URL"):
    addresses.check(verb, "", config.resolve(c), tmp_path)


def test_what_a_command_does_not_read_may_be_on_this_machine(tmp_path):
  c = empty()
  c.teacher.source = c.data.path = str(tmp_path / "x")
  addresses.check("train", "", config.resolve(c), tmp_path)
  c.teacher.source, c.data.packed = "hub:a/b", "gs://bucket/packed"
  addresses.check("record", "", config.resolve(c), tmp_path)
  c.train.heldout = (str(tmp_path / "x"),)
  c.data.path = ""
  addresses.check("evaluate", "", config.resolve(c), tmp_path)


def test_retarget_needs_no_accelerator(tmp_path):
  with pytest.raises(InputError, match="retarget does not use accelerators. Run it on one machine"):
    addresses.check("retarget", "", config.resolve(empty()), tmp_path)


@pytest.mark.parametrize("verb", ["chain", "evaluate", "on_policy", "train"])
def test_benchmarks_are_in_packages_or_in_the_repository(verb, tmp_path):
  """Benchmarks are not read from URLs, so a URL is refused too."""
  c = empty()
  c.train.eval_benchmarks = ("gsm8k",)
  for path in (str(tmp_path / "x.jsonl"), "gs://bucket/x.jsonl", "tests/test_api.py", ""):
    c.evals.gsm8k = config.benchmark("gsm8k", path=path)
    on_hosts = not path or path.startswith("tests")
    refused = pytest.raises(InputError, match=r"evals\.gsm8k\.path is .*; expected package:")
    with nullcontext() if on_hosts else refused:
      addresses.check(verb, "", config.resolve(c), ROOT)


def test_benchmarks_that_no_evaluation_of_the_training_runs_may_be_anywhere(tmp_path):
  c = empty()
  c.evals.gsm8k = config.benchmark("gsm8k", path=str(tmp_path / "x.jsonl"))
  addresses.check("train", "", config.resolve(c), ROOT)


def test_the_students_of_a_chain_are_on_every_host(tmp_path):
  c = empty()
  c.chain = ("half",)
  c.links.half = config.link()
  c.links.half.student.source = str(tmp_path / "x")
  with pytest.raises(InputError, match=r"links\.half\.student\.source is .*; expected a URL"):
    addresses.check("chain", "", config.resolve(c), tmp_path)
