"""The tokenizers that a config names, and the lengths of rows in the student's tokens."""

import json

import numpy as np
import pytest
import small_tokenizers
import tiny_pair

from distill_jax.cross_tokenizer import sides
from distill_jax.cross_tokenizer.student_lengths import Rows, student_lengths
from distill_jax.data.options import DataOptions
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError

SPECIAL = ("<|endoftext|>", "<|im_end|>")


@pytest.fixture
def folder(tmp_path):
  """A tokenizer whose config names the end of a turn as its eos_token, and a further stop token."""
  (tmp_path / "tokenizer.json").write_bytes(small_tokenizers.byte_level(special=SPECIAL).raw)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [300]}))
  return tmp_path


def test_documents_end_with_the_end_of_a_document(folder):
  """The student's folder is loaded like the teacher's, and stop tokens have no bytes."""
  own = load_tokenizer(folder)
  end, turn_end = (own.token_id(token) for token in SPECIAL)
  teacher = sides.teacher_side(DataOptions(tokenizer=str(folder)), None, own, is_chat=False)
  student = sides.student_side("retarget.tokenizer", str(folder), None, is_chat=False)
  assert teacher.vocabulary.end == student.vocabulary.end == end
  assert student.vocabulary.stops == {end, turn_end, 300}
  assert student.vocabulary.bytes_V[300] is None


def test_a_student_without_a_tokenizer(tmp_path):
  with pytest.raises(InputError, match="retarget.tokenizer is ''; expected the student's tok"):
    sides.student_side("retarget.tokenizer", "", None, is_chat=False)
  with pytest.raises(InputError, match="none.json does not exist"):
    sides.student_side("retarget.tokenizer", str(tmp_path / "none.json"), None, is_chat=False)


class Letters:
  """Rows of the teacher's letters "a", which the student's tokens spell one by one or in pairs."""

  def __init__(self, tables, rows, length):
    token = tables.teacher.tokenizer.encode("a")[0]
    tokens_T, ones_T = np.full(length, token, np.int32), np.ones(length, np.int32)
    self._row = {"tokens_T": tokens_T, "segments_T": ones_T, "mask_T": ones_T > 0}
    self._rows = rows

  def __len__(self):
    return self._rows

  def read_many(self, indices):
    return [self._row for _ in indices]


def test_lengths_keep_the_ratios_of_the_stores():
  tables = tiny_pair.tables()
  rows = {str(n): Rows(Letters(tables, 3, n), n, "here") for n in (100, 200, 400)}
  lengths = student_lengths(tables, rows, 0)
  assert lengths["100"] * 4 == lengths["200"] * 2 == lengths["400"] and lengths["400"] % 128 == 0
  assert student_lengths(tables, rows, 40) == {"100": 10, "200": 20, "400": 40}
  with pytest.raises(InputError, match=r"retarget.seq_len is 42; expected a multiple of 4"):
    student_lengths(tables, rows, 42)


def test_heldout_rows_have_a_length_of_training():
  tables = tiny_pair.tables()
  rows = {"a": Rows(Letters(tables, 3, 400), 400, "here")}
  needed = student_lengths(tables, rows, 0)["a"]
  assert student_lengths(tables, rows, 0, (needed * 2, needed, 2)) == {"a": needed}
  assert student_lengths(tables, rows, 0, (2, 3)) == {"a": 3}  # what does not fit is cut
