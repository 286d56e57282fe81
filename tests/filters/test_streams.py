"""Filters that compare a sample with others: votes, pass rates, duplicates, decontamination."""

import random
import re

import numpy as np
import pytest
from json_lines import write_lines
from tiny_samples import a_sample, by_prompt, group, judge, kind, kinds

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.filters import _ngrams, near_duplicates
from distill_jax.filters.samples import Unjudgeable
from distill_jax.runtime import files

pytestmark = pytest.mark.smoke


def test_votes():
  samples = group(0, [r"\boxed{0.5}", "1/2", r"\boxed{\frac{1}{2}}", "it is 3", "nothing"])
  samples += group(1, ["1", "2"]) + group(2, ["no", "no"]) + group(3, ["8"], of=4)
  made = registry.load("filters", "votes").Filter()
  out = by_prompt(made, samples)
  want = [None] * 3 + ["outvoted", "no answer"] + ["tie"] * 2 + ["no answer"] * 2 + [None]
  assert [kind(why) for _, why in out] == want
  assert [s["agreement"] for s, why in out if not why] == [0.6, 0.6, 0.6, 0.25]
  once = kinds("votes", samples, one=True, at_least=0.5)
  assert once[:3] == [None] + ["another sample with this answer is kept"] * 2
  assert once[-1] == "low agreement"
  assert kinds("votes", group(0, ["Yes.", "yes", "no"]), of="text") == [None, None, "outvoted"]


def test_pass_rate():
  samples = group(0, ["a"] * 4) + group(1, ["a"], of=4) + group(2, ["a", "a"], of=4)
  whys = kinds("pass_rate", samples, at_least=0.5, at_most=0.9)
  assert whys == ["too easy"] * 4 + ["too hard"] + [None] * 2


def test_pseudo_label():
  rows = [("Positive.", np.log(0.95), 0.5), ("negative", np.log(0.5), 1.0), ("good", 0.0, 1.0)]
  samples = [a_sample(t, logprob=p, agreement=a) for t, p, a in rows]
  labels = ("positive", "negative")
  made = registry.load("filters", "pseudo_label").Filter(labels=labels)
  out = list(made.select(samples))
  assert [kind(why) for _, why in out] == [None, "low confidence", "not a label"]
  assert out[0][0]["label"] == "positive" and out[0][0]["confidence"] == pytest.approx(0.95)
  by_agreement = kinds("pseudo_label", samples, labels=labels, by="agreement")
  assert by_agreement[:2] == ["low confidence", None]
  assert isinstance(
    judge("pseudo_label", [a_sample("positive", logprob=None)], labels=labels)[0], Unjudgeable
  )


def test_minhash_estimates_the_jaccard_similarity():
  rng = random.Random(0)
  errors = []
  for share in np.linspace(0.1, 0.95, 18):
    common = [rng.randbytes(8) for _ in range(int(400 * share))]
    a, b = (set(common + [rng.randbytes(8) for _ in range(400 - len(common))]) for _ in "ab")
    exact = len(a & b) / len(a | b)
    signatures = [near_duplicates.signature(np.frombuffer(b"".join(x), np.uint64)) for x in (a, b)]
    got = np.mean(signatures[0] == signatures[1])
    errors.append((got - exact) / np.sqrt(exact * (1 - exact) / near_duplicates.PERMUTATIONS))
  assert np.abs(errors).max() < 4 and abs(np.mean(errors)) < 1 and np.std(errors) > 0.3


def test_near_duplicates():
  rng = random.Random(1)
  words = [f"w{rng.randrange(5000)}" for _ in range(300)]
  nearly = words[:150] + ["other"] + words[151:]
  fresh = [f"v{rng.randrange(5000)}" for _ in range(300)]
  half = words[:150] + fresh[:150]
  texts = [" ".join(w) for w in (words, nearly, fresh, half, words)] + ["", "", "!"]
  whys = kinds("near_duplicates", group(0, texts))
  near = "near-duplicate"
  assert whys == [None, near, None, None, near, None, near, None]
  other = [
    a_sample("x", id=i, sample=s, prompt=p)
    for i, s, p in ((0, 0, texts[0]), (0, 1, texts[0]), (1, 0, texts[1]))
  ]
  assert kinds("near_duplicates", other, of="prompt") == [None, None, near]


def test_each_character_of_chinese_and_japanese_is_a_word(tmp_path):
  mixed = "GPT4は「東京・ﾀﾜｰ」へ，2次方程式 x²を 풀어 보세요 naïve"
  words = "gpt4 は 東 京 ﾀ ﾜ ｰ へ 2 次 方 程 式 x² を 풀어 보세요 naïve"
  assert " ".join(_ngrams.WORD.findall(mixed.casefold())) == words
  others = "Größe, ёлка_1 — 안녕하세요, สวัสดี ١٢٣ don't"
  assert _ngrams.WORD.findall(others) == re.findall(r"\w+", others)
  question = "小明有三个苹果，妈妈又给了他五个苹果，他现在一共有几个苹果？"
  path = write_lines(tmp_path / "cmath.jsonl", [{"question": question}])
  samples = [a_sample(f"题目：{question}答案是八。"), a_sample("小红有两个梨。", id=1)]
  assert kinds("decontaminate", samples, against=(str(path),)) == ["in cmath", None]
  texts = [f"{question}答案是八。", f"{question}答案是九。", samples[1]["text"]]
  assert kinds("near_duplicates", group(0, texts)) == [None, "near-duplicate", None]


def test_decontaminate(tmp_path, capsys):
  question = [f"q{i}" for i in range(20)]
  rows = [{"question": " ".join(question), "answer": "4"}, {"question": "one " * 9}]
  path = write_lines(tmp_path / "gsm8k.jsonl", rows)
  inside = "So, " + ", ".join(question[3:16]).upper() + "!"
  texts = [inside, " ".join(question[3:15]) + " q16 q17", "fine", "One, " * 9]
  samples = [a_sample(t) for t in texts] + [a_sample(prompt=[{"role": "user", "content": inside}])]
  whys = judge("decontaminate", samples, against=(str(path),))
  assert [kind(w) for w in whys] == ["in gsm8k", None, None, "in gsm8k", "in gsm8k"]
  assert " ".join(question[3:16]) in whys[0] and "line 1" in whys[0]
  assert "1 of 3 texts have fewer than 8 words" in capsys.readouterr().err
  assert kinds("decontaminate", samples, against=(str(path),), prompt=False)[4] is None
  files.write("memory://sets/gsm8k.jsonl", path.read_bytes())
  assert judge("decontaminate", samples, against=("memory://sets/gsm8k.jsonl",)) == whys
  for fields, match in (
    ({"fields": ("x",)}, "line 1 has no field 'x'"),
    ({"ngram": 7}, "ngram is 7; expected at least 8"),
  ):
    with pytest.raises(InputError, match=match):
      judge("decontaminate", samples, against=(str(path),), **fields)
