"""Ends that the model does not make."""

import numpy as np
import pytest
import tiny

from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.stops import Stops


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory):
  return load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json"))


def grown(stops: Stops, ids: list[int], steps: int) -> tuple[int, str] | None:
  """Where a text ends that grows by so many tokens a look."""
  for old in range(0, len(ids), steps):
    if found := stops.first(ids[: old + steps], old):
      return found
  return None


@pytest.mark.parametrize("steps", [1, 3, 8, 100])
def test_stop_strings_end_a_text_at_the_token_that_completes_the_first(bytes_, steps):
  """A token is a byte here, so every stop string is cut; some characters are three tokens."""
  text = "Tür 1 ist zu – \n\nQ: and ### more\n\nQ:"
  stops = Stops(bytes_, ("###", "\n\nQ:", "–"))
  ids = bytes_.encode(text)
  n = len("Tür 1 ist zu –".encode())
  assert grown(stops, ids, steps) == (n, "stop")
  assert stops.text(ids[:n]) == "Tür 1 ist zu "
  n = text.encode().index(b"\n\nQ:") + 4
  stops = Stops(bytes_, ("###", "\n\nQ:", "nowhere"))
  assert grown(stops, ids, steps) == (n, "stop")
  assert stops.text(ids[:n]) == "Tür 1 ist zu – "
  assert grown(Stops(bytes_, ("nowhere",)), ids, steps) is None


@pytest.mark.parametrize("steps", [1, 5, 100])
@pytest.mark.parametrize("period", [1, 3, 4])
def test_running_in_circles(bytes_, steps, period):
  """The last 16 tokens are one run of at most 4, four times or more."""
  rng = np.random.default_rng(0)
  free = rng.permutation(100)[:30].tolist()
  circle = [200 + i for i in range(period)]
  stops = Stops(bytes_, repetition=16)
  assert grown(stops, free + circle * 20, steps) == (30 + 16, "repetition")
  assert grown(stops, free + circle * (15 // period) + free, steps) is None
  assert grown(stops, circle * 20, steps) == (16, "repetition")


def test_a_run_too_long_for_the_circles_asked_for_is_none(bytes_):
  assert grown(Stops(bytes_, repetition=16), list(range(5)) * 20, 4) is None
  assert grown(Stops(bytes_), [1] * 100, 4) is None


def test_the_first_end_counts(bytes_):
  ids = bytes_.encode("aaaaaaaaaaaaaaaaaaaaaaaa.")
  assert grown(Stops(bytes_, ("aaaaa",), repetition=16), ids, 100) == (5, "stop")
  assert grown(Stops(bytes_, (".",), repetition=16), ids, 100) == (16, "repetition")


@pytest.mark.parametrize("bad", [{"strings": ("",)}, {"repetition": 2}, {"repetition": -1}])
def test_what_ends_every_text_is_refused(bytes_, bad):
  with pytest.raises(InputError, match="generate"):
    Stops(bytes_, **bad)
