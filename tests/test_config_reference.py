"""The reference of the config agrees with the config, and every key is explained."""

import dataclasses
from pathlib import Path

import config_reference as page
import pytest

from distill_jax import config, config_reference, registry, schedules
from distill_jax.registry import ENTRY_CLASSES

DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"


def plain(value):
  """A value as a config file writes it."""
  return value.values[0] if isinstance(value, schedules.Schedule) else value


def check(cls):
  """Asserts that what is read from the source is what the dataclass holds."""
  read = {field.name: field for field in config_reference.fields_of(cls)}
  assert set(read) == {field.name for field in dataclasses.fields(cls)}
  for field in dataclasses.fields(cls):
    ours = read[field.name]
    if ours.section is not None and not ours.is_dict:
      check(type(field.default))
      continue
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    assert eval(ours.default) == plain(default), ours.name


def test_sections_are_as_their_dataclasses():
  check(config.Config)
  check(config.LinkOptions)


@pytest.mark.parametrize("package", ENTRY_CLASSES)
def test_entries_are_as_their_dataclasses(package):
  assert config_reference.entries(package) == registry.names(package)
  for name in registry.names(package):
    check(getattr(registry.load(package, name), ENTRY_CLASSES[package]))


def test_verbs_are_as_the_registry_has_them():
  assert config_reference.entries("commands") == registry.names("commands")


def test_every_key_of_the_config_is_found():
  def dotted(tree, prefix=""):
    for key, value in tree.items():
      yield prefix + key
      if hasattr(value, "items"):
        yield from dotted(value, f"{prefix}{key}.")

  known = {key.dotted for key in config_reference.all_keys()}
  assert set(dotted(config.base())) <= known


def test_a_word_stands_for_the_keys_that_end_with_it():
  assert config_reference.find("peak_lr") == ["optim.peak_lr", "links.NAME.peak_lr"]
  assert config_reference.find("kd") == ["losses.kd"]
  assert config_reference.find("evals.math500.stop") == ["evals.math500.stop"]
  assert config_reference.find("nothing") == []
  assert "losses.kd.temperature" in config_reference.find("losses.soft.temperature")
  assert config_reference.nearest("train.stpes")[0] == "train.steps"


def owners():
  """(dotted section, dataclass) of all sections and entries."""
  return [("", config_reference.CONFIG), *config_reference.sections().items()]


@pytest.mark.parametrize("name, ref", owners(), ids=lambda x: x if isinstance(x, str) else "")
def test_every_key_has_a_docstring(name, ref):
  missing = [field.name for field in config_reference.fields_of(ref) if not field.doc]
  assert not missing
  assert all(field.doc.rstrip().endswith(".") for field in config_reference.fields_of(ref))


def test_the_page_is_current():
  """Run `python tools/config_reference.py > docs/configuration.md` after a change of the keys."""
  assert DOCS.read_text(encoding="utf-8") == page.page()
