"""Rows for a new vocabulary against the formula, with the bytes of tokens found in another way."""

import numpy as np
import pytest
import sentencepiece
import tiny
import tokenizers
from train_sentencepiece import train_sentencepiece

from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.retokenize import rows
from distill_jax.retokenize.rows import BYTES, EQUAL, REST, ROLE, TOKENS

EMOJI = ["😀😁😂😃😄😅😆 漢字漢語 é è ê" * 3] * 9
OTHER = ["Every number can be divided by one, which the teacher explains to 12 students."] * 9


def bpe(path, texts, size, special):
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=special,
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  backend.train_from_iterator(texts, trainer)
  backend.save(str(path))
  return load_tokenizer(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def old(folder):
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  return bpe(folder / "old.json", tiny.sentences() + OTHER, 330, special)


@pytest.fixture(scope="module")
def new_bpe(folder):
  special = ["<|end_of_text|>", "<|eot_id|>", "<|reserved|>"]
  return bpe(folder / "new.json", tiny.sentences() + EMOJI, 420, special)


@pytest.fixture(scope="module")
def new_pieces(folder):
  return train_sentencepiece(tiny.sentences() + OTHER, 380, folder / "new.model", "bpe")


def spell(new, old, given=()):
  new, old = Vocabulary(new), Vocabulary(old)
  return rows.spell(new, old, rows.special_tokens(new, old, dict(given)))


def table(old, dtype=np.float32):
  rng = np.random.default_rng(0)
  return rng.standard_normal((old.vocab_size + 6, 5)).astype(dtype)


def piece_of(text: str) -> str:
  """The letters that spell a text in a byte-level vocabulary, by the tokenizers library."""
  cut = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return "".join(piece for piece, _ in cut.pre_tokenize_str(text))


def letters() -> dict[str, int]:
  """The byte of each letter, from characters that have all bytes of UTF-8."""
  points = [*range(0x800), *range(0x1000, 0xD000, 64), *range(0xE000, 0x110000, 0x1000)]
  pairs = [(piece_of(c), c.encode()) for c in map(chr, points)]
  return {letter: byte for piece, raw in pairs for letter, byte in zip(piece, raw, strict=True)}


def formula(old, old_VD, piece: str, text: str | None):
  """The row of a token, by the tokenizers library alone, in float64, and its kind.

  Args:
    old: The old tokenizer, a byte-level BPE.
    old_VD: Its rows.
    piece: The letters of the token's bytes.
    text: Its text, or None for a part of a character.
  """
  backend, x_VD = tokenizers.Tokenizer.from_str(old.raw.decode()), old_VD.astype(np.float64)
  if (same := backend.token_to_id(piece)) is not None:
    return x_VD[same], EQUAL
  if text is not None:
    return x_VD[backend.encode(text, add_special_tokens=False).ids].mean(0), TOKENS
  ids = []
  while piece:
    n = max(n for n in range(1, len(piece) + 1) if backend.token_to_id(piece[:n]) is not None)
    ids.append(backend.token_to_id(piece[:n]))
    piece = piece[n:]
  return x_VD[ids].mean(0), BYTES


def check(old, spelling, new_VD, old_VD, pieces):
  """Compares the rows of tokens, as (id, letters, text), with the formula."""
  kinds = set()
  for i, piece, text in pieces:
    want, kind = formula(old, old_VD, piece, text)
    assert spelling.kinds[i] == kind, (piece, text)
    kinds.add(kind)
    if kind == EQUAL:
      np.testing.assert_array_equal(new_VD[i], want.astype(old_VD.dtype))
    else:  # sums of a few float32
      np.testing.assert_allclose(new_VD[i], want, rtol=0, atol=1e-6)
  return kinds


def test_byte_level_tokens_are_copies_or_means(old, new_bpe):
  spelling, old_VD = spell(new_bpe, old), table(old)
  new_VD = rows.new_rows(old_VD, spelling, 512)
  byte_of, ids = letters(), range(3, new_bpe.vocab_size)
  pieces = []
  for i in ids:
    piece = new_bpe.piece(i)
    raw = bytes(byte_of.get(c, 0xFF) for c in piece)  # no text has the bytes that are not there
    try:
      pieces.append((i, piece, raw.decode()))
    except UnicodeDecodeError:
      pieces.append((i, piece, None))
  assert check(old, spelling, new_VD, old_VD, pieces) == {EQUAL, TOKENS, BYTES}
  assert list(spelling.kinds[:3]) == [ROLE, ROLE, REST]
  np.testing.assert_array_equal(new_VD[0], old_VD[old.token_id("<|endoftext|>")])
  np.testing.assert_array_equal(new_VD[1], old_VD[old.token_id("<|im_end|>")])
  # Reserved tokens and padding; the padding of the old table is not part of the mean.
  mean = old_VD[: old.vocab_size].astype(np.float64).mean(0)
  assert new_bpe.vocab_size < 512
  for row in (new_VD[2], *new_VD[new_bpe.vocab_size :]):
    np.testing.assert_array_equal(row, mean.astype(np.float32))
  counts = spelling.counts()
  assert sum(counts.values()) == new_bpe.vocab_size and counts["role"] == 2
  assert counts["rest"] == 1 and min(counts["equal"], counts["tokens"], counts["bytes"]) > 5


def test_pieces_are_copies_or_means(old, new_pieces):
  """Byte-fallback tokens, also those of the bytes of ordinary pieces, are copies."""
  spelling, old_VD = spell(new_pieces, old), table(old)
  new_VD = rows.new_rows(old_VD, spelling, 384)
  sp = sentencepiece.SentencePieceProcessor(model_proto=new_pieces.raw)
  byte_of = {byte: letter for letter, byte in letters().items()}
  pieces = []
  for i in range(sp.get_piece_size()):
    if sp.is_byte(i):
      if (byte := int(sp.id_to_piece(i)[3:5], 16)) in byte_of:
        pieces.append((i, byte_of[byte], None))
    elif not sp.is_control(i) and not sp.is_unknown(i):
      text = sp.id_to_piece(i).replace("\u2581", " ")
      pieces.append((i, piece_of(text), text))
  assert len(pieces) > 350
  assert check(old, spelling, new_VD, old_VD, pieces) == {EQUAL, TOKENS}
  end = new_VD[sp.eos_id()]
  np.testing.assert_array_equal(end, old_VD[old.token_id("<|endoftext|>")])


def test_from_pieces_to_bytes(new_pieces, new_bpe):
  """The old tokenizer has a dummy prefix, which is not part of a token from inside a text."""
  spelling = spell(new_bpe, new_pieces)
  at = new_bpe.token_id("1")
  first = spelling.ids[spelling.starts[at] : spelling.starts[at + 1]]
  assert [new_pieces.piece(i) for i in first] == ["1"]
  old = Vocabulary(new_pieces)
  for i, text in enumerate(Vocabulary(new_bpe).bytes_V):
    ids = spelling.ids[spelling.starts[i] : spelling.starts[i + 1]]
    assert text is None or old.spell(ids) == text
  assert spelling.counts()["rest"] == 1  # a control token without a role


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_do_not_depend_on_the_blocks(old, new_bpe, dtype, monkeypatch):
  import ml_dtypes

  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  spelling, old_VD = spell(new_bpe, old), table(old, kind)
  whole = rows.new_rows(old_VD, spelling, 421)
  assert whole.dtype == kind
  for block in (1, 5 * 7, 5 * 64):
    monkeypatch.setattr(rows, "BLOCK", block)
    np.testing.assert_array_equal(rows.new_rows(old_VD, spelling, 421), whole)


def test_given_roles(old, new_bpe):
  spelling = spell(new_bpe, old, {"<|reserved|>": "<|im_start|>"})
  at = spelling.starts[2]
  assert spelling.ids[at] == old.token_id("<|im_start|>") and spelling.counts()["rest"] == 0
  with pytest.raises(InputError, match=r"retokenize.roles is .*expected .* has no '<\|x\|>'"):
    spell(new_bpe, old, {"<|x|>": "<|im_start|>"})
  with pytest.raises(InputError, match=r"old.json has no '<\|reserved\|>'"):
    spell(new_bpe, old, {"<|reserved|>": "<|reserved|>"})
