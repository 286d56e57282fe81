"""Stop strings and repetition end a text."""

import numpy as np
import pytest
import small_tokenizers
import tiny

from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.stops import Stops

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory):
  return load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json"))


def grown(stops: Stops, ids: list[int], steps: int) -> tuple[int, str] | None:
  """Returns the end of a text to which `steps` tokens are added at a time."""
  for old in range(0, len(ids), steps):
    if found := stops.first(ids[: old + steps], old):
      return found
  return None


@pytest.mark.parametrize("steps", [1, 3, 8, 100])
def test_the_first_complete_stop_string_ends_a_text(bytes_, steps):
  """Tokens are bytes, so stop strings and some characters have several tokens."""
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


KINDS = {
  "bytes": small_tokenizers.byte_level,
  "fallback": lambda: small_tokenizers.metaspace(prefix=False),
  "fallback, prefix": lambda: small_tokenizers.metaspace(prefix=True),
  "sentencepiece": lambda: small_tokenizers.sentencepiece_model(prefix=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_is_what_the_model_wrote_with_every_tokenizer(kind):
  """The space of its first token is kept, and characters next to one that is cut off."""
  tokenizer = KINDS[kind]()
  prompt, continuation = "Q:", " is 日本語"
  whole = tokenizer.encode(prompt + continuation)
  tokens = whole[len(tokenizer.encode(prompt)) :]
  assert tokenizer.encode(prompt) + tokens == whole
  assert Stops(tokenizer).text(tokens) == continuation
  assert Stops(tokenizer).text(tokens[:-1]) == continuation[:-1] + "\ufffd"


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_a_text_after_the_same_token_whatever_the_steps(kind, steps):
  """Even if the part that is searched begins or ends within a character."""
  tokenizer = KINDS[kind]()
  tokens = tokenizer.encode("日本語の文章です" * 3 + "。終わり。")
  stops = Stops(tokenizer, ("。終",))
  n, reason = grown(stops, tokens, steps)
  assert reason == "stop" and tokenizer.decode(tokens[:n]).endswith("。終")
  assert stops.text(tokens).strip() == "日本語の文章です" * 3  # some encode a space first


@pytest.mark.parametrize("steps", [1, 5, 100])
@pytest.mark.parametrize("period", [1, 3, 4])
def test_a_loop_ends_a_text(bytes_, steps, period):
  """A loop is detected when the last 16 tokens repeat a sequence of at most 4 tokens."""
  rng = np.random.default_rng(0)
  free = rng.permutation(100)[:30].tolist()
  circle = [200 + i for i in range(period)]
  stops = Stops(bytes_, repetition=16)
  assert grown(stops, free + circle * 20, steps) == (30 + 16, "repetition")
  assert grown(stops, free + circle * (15 // period) + free, steps) is None
  assert grown(stops, circle * 20, steps) == (16, "repetition")


def test_loops_of_longer_sequences_are_ignored(bytes_):
  assert grown(Stops(bytes_, repetition=16), list(range(5)) * 20, 4) is None
  assert grown(Stops(bytes_), [1] * 100, 4) is None


def test_the_first_end_counts(bytes_):
  ids = bytes_.encode("aaaaaaaaaaaaaaaaaaaaaaaa.")
  assert grown(Stops(bytes_, ("aaaaa",), repetition=16), ids, 100) == (5, "stop")
  assert grown(Stops(bytes_, (".",), repetition=16), ids, 100) == (16, "repetition")


@pytest.mark.parametrize("bad", [{"strings": ("",)}, {"repetition": 2}, {"repetition": -1}])
def test_invalid_end_conditions_are_errors(bytes_, bad):
  with pytest.raises(InputError, match="generate"):
    Stops(bytes_, **bad)
