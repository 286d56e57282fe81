"""The source of values in a config file."""

import ast

import pytest

from distill_jax.recipe import config_file


@pytest.mark.parametrize(
  "value", ["plain", 'a "name"\n', "/tmp/📚/notes.txt", "𠮷é", "\udcff\ud83d", "a\x7f\x85\u2028b"]
)
def test_the_source_of_a_string_gives_the_string(value):
  source = config_file.source(value)
  assert ast.literal_eval(source) == value
  assert len(source.encode().splitlines()) == len(source.splitlines()) == 1
