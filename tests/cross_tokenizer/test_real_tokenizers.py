"""The tokens of published tokenizers spell real text; see real_tokenizers.py."""

import pytest
import slow
from real_tokenizers import REAL, load
from spelling import DECOMPOSED, TEXTS, check_id_of, check_ids, check_places

from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.sources import DocumentSource, documents

PREFIXED = ("llama2", "mistral")


@pytest.fixture(
  scope="module",
  params=slow.all_but(("smollm2",), REAL),
)
def real(request):
  return request.param, Vocabulary(load(request.param))


def test_real_text_is_spelt(real):
  name, vocabulary = real
  texts = [*TEXTS, *(d[:2000] for d in documents(DocumentSource("pydoc", split="heldout")))]
  for text in texts:
    if name == "qwen3" and text in DECOMPOSED:  # its normalizer is NFC
      assert vocabulary.locate(text) is None
    else:
      assert check_places(vocabulary, text) == (-1 if name in PREFIXED and text else 0)
      assert vocabulary.spell(vocabulary.encode_inner(text)) == text.encode()


def test_the_bytes_of_ids_are_those_of_the_decoder(real):
  name, vocabulary = real
  _, size, control, literal = REAL[name]
  assert vocabulary.size == size
  text = [b for b in vocabulary.bytes_V if b]
  assert check_ids(vocabulary) > 0.97 * len(text)
  assert {bytes([b]) for b in range(32, 127)} <= vocabulary.id_of.keys()
  i = vocabulary.tokenizer.token_id
  assert {i(t) for t in control} <= vocabulary.control
  spaced = lambda t: t.replace("\u2581", " ") if name == "gemma3" else t
  assert [vocabulary.bytes_V[i(t)] for t in literal] == [spaced(t).encode() for t in literal]
  if size < 50_000:
    check_id_of(vocabulary)


def test_every_stop_token_ends_the_students_texts(real):
  name, vocabulary = real
  student = Vocabulary(load("smollm2"))
  roles = match_roles(vocabulary, student, {})
  if name == "smollm2":
    assert roles == {i: i for i in vocabulary.control}
  else:
    assert {roles[i] for i in vocabulary.stops} == {student.tokenizer.token_id("<|endoftext|>")}
