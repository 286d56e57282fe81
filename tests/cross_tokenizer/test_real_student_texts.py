"""A student's texts with published tokenizers; see real_tokenizers.py."""

import numpy as np
import pytest
from real_tokenizers import load

from distill_jax.cross_tokenizer.chains import Splits, chains
from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.sides import Side
from distill_jax.cross_tokenizer.student_texts import StudentTexts
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.sources import DocumentSource, documents

PAIRS = [("mistral", "smollm2"), ("smollm2", "mistral"), ("qwen3", "smollm2"), ("gemma3", "qwen3")]


def sampled(student, text, rng):
  """The tokens of a text, of which one in twenty is spelt by two others, and its end."""
  ids = []
  for i in student.tokenizer.encode(text):
    spelt = student.bytes_V[i] or b""
    cut = int(rng.integers(1, len(spelt))) if len(spelt) > 1 else 0
    parts = [student.id_of.get(b) for b in (spelt[:cut], spelt[cut:])]
    ids += parts if None not in parts and rng.random() < 0.05 else [i]
  return [*student.tokenizer.begin, *ids, student.end]


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_every_sampled_token_has_a_target(theirs, ours):
  teacher, student = Vocabulary(load(theirs)), Vocabulary(load(ours))
  tables = PairTables(teacher, student, match_roles(teacher, student, {}))
  splits, rng = Splits.of(tables), np.random.default_rng(0)
  texts = StudentTexts(tables, Side(teacher, None), Side(student, None), 4096)
  changed = 0
  for text in [d[:3000] for d in documents(DocumentSource("pydoc", split="heldout"))]:
    ids = sampled(student, text, rng)
    changed += ids[len(student.tokenizer.begin) : -1] != student.tokenizer.encode(text)
    t, n, prompt = np.arange(len(ids) + 4), len(ids), 10
    tokens = np.append(ids, np.zeros(4)).astype(np.int32)
    mask = (t >= prompt - 1) & (t < n - 1)
    row = {"tokens_T": tokens, "segments_T": np.int32(t < n), "mask_T": mask}
    aligned, read = texts.align(row)
    np.testing.assert_array_equal(aligned.records[0]["mask_T"], mask)
    used = read["tokens_T"][read["segments_T"] > 0].tolist()
    begin = teacher.tokenizer.begin
    assert used == [*begin, *teacher.tokenizer.encode(text), teacher.end]
    places = aligned.aligned
    for h in aligned.token_X[:-1]:  # the first bytes of each token are those at its place
      g, offset = places.g_H[h], places.offset_H[h]
      mine, whole = student.bytes_V[ids[h]], teacher.bytes_V[used[g]]
      assert whole[offset:].startswith(mine) or mine.startswith(whole[offset:])
    assert not chains(tables, splits, places, aligned.token_X, aligned.known_G).cut.any()
  assert changed > 5
