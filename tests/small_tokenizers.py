"""Small tokenizers of every style, trained in milliseconds."""

from __future__ import annotations

import functools
import io
import json

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from distill_jax.data.tokenizers import Tokenizer

# Words whose pieces differ between vocabularies of different sizes, and code.
CORPUS = [
  *(f"{i} times {i + 3} is {i * (i + 3)}, as anyone can see." for i in range(60)),
  *("def f(x):\n    return x + 1\n\n    # naïve café, Ünïcode größer\n" for _ in range(6)),
  *("the theme of the other one is that they then gather there\n\n" for _ in range(6)),
]


def byte_level(
  size: int = 400, special=("<|endoftext|>", "<|im_end|>"), literal=(), normalizer=None
) -> Tokenizer:
  """Returns a byte-level BPE tokenizer, as GPT-2, Qwen, Llama 3 and DeepSeek have.

  Args:
    size: The number of ids without the literal ones.
    special: Added tokens with the flag.
    literal: Added tokens without the flag.
    normalizer: E.g. "NFC".
  """
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  if normalizer:
    backend.normalizer = getattr(normalizers, normalizer)()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(
    vocab_size=size, special_tokens=[*special], show_progress=False, initial_alphabet=alphabet
  )
  backend.train_from_iterator(CORPUS, trainer)
  backend.add_tokens([AddedToken(t, normalized=False) for t in literal])
  return Tokenizer(backend.to_str().encode(), "byte-level", None, None)


def metaspace(prefix: bool, runs=()) -> Tokenizer:
  """Returns a BPE tokenizer with U+2581 for spaces and a token for each byte.

  Args:
    prefix: True for a dummy prefix, as Llama 2 has.
    runs: Added tokens without the flag, as Gemma's runs of spaces.
  """
  control = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
  trained = tokenizers.Tokenizer(models.BPE())
  trained.normalizer = normalizers.Replace(" ", "\u2581")
  trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
  model = json.loads(trained.to_str())["model"]
  pieces = [*control, *(f"<0x{b:02X}>" for b in range(256)), *runs]
  pieces += [p for p in model["vocab"] if p not in pieces]
  backend = tokenizers.Tokenizer(
    models.BPE(
      {p: i for i, p in enumerate(pieces)},
      [tuple(m) for m in model["merges"]],
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  replace = normalizers.Replace(" ", "\u2581")
  chain = [normalizers.Prepend("\u2581"), replace] if prefix else [replace]
  backend.normalizer = normalizers.Sequence(chain)
  ends = [decoders.Strip(" ", 1, 0)] if prefix else []
  spaces = decoders.Replace("\u2581", " ")
  backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), *ends])
  backend.add_special_tokens(control)
  backend.add_tokens([AddedToken(t, normalized=False) for t in runs])
  return Tokenizer(backend.to_str().encode(), "Metaspace", "</s>", "<s>")


@functools.cache
def sentencepiece_model(
  prefix: bool, kind: str = "bpe", runs: tuple[str, ...] = ("\u2581" * 4,)
) -> Tokenizer:
  """Returns a sentencepiece model with byte fallback, as Llama 2 and Mistral (prefix=True) have."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(line for text in CORPUS for line in text.split("\n") if line),
    model_writer=out,
    vocab_size=400,
    model_type=kind,
    byte_fallback=True,
    character_coverage=1.0,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=prefix,
    user_defined_symbols=[*runs],
    hard_vocab_limit=False,
    num_threads=1,
    minloglevel=2,
  )
  return Tokenizer(out.getvalue(), "a sentencepiece model", None, None)
