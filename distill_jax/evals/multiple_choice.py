"""Benchmarks of choices: a model's answer is the choice that it finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.data import jsonl
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.evals import _scores, likelihood
from distill_jax.evals._base import Choice
from distill_jax.evals.questions import Questions
from distill_jax.runtime import distributed
from distill_jax.types import JsonObject

VERDICTS, LEFT_OUT = "verdicts.jsonl", "left_out.jsonl"


def measure(
  scorer: likelihood.Scorer, tokenizer: Tokenizer, questions: Questions, folder: Path
) -> JsonObject:
  """Scores every choice after its context.

  In `folder`: verdicts.jsonl, {id, logps, label, chosen, chosen_norm} a question, in nats;
  left_out.jsonl, the questions that do not count.

  Returns:
    questions; left_out, how many do not count; acc, the share of questions whose likeliest choice
    is right; acc_norm, of those whose likeliest by character of its text is, as in
    lm-evaluation-harness. With intervals.

  Raises:
    InputError: evaluate.on_bad is "stop" and a question is longer than the model reads, or all
      are.
  """
  fitting = Questions(questions.name, questions.policy, left_out=[*questions.left_out])
  by_question: list[list[likelihood.Pair]] = []
  for where, question in questions.usable:
    try:
      pairs = [likelihood.make_pair(tokenizer, question.context, c) for c in question.choices]
      if not all(map(scorer.fits, pairs)):
        raise InputError(f"it is longer than the {scorer.max_len} tokens that the model reads")
    except InputError as e:
      fitting.leave_out(where, str(e))
      continue
    fitting.add(where, question)
    by_question.append(pairs)
  fitting.check()
  scored = iter(scorer([pair for pairs in by_question for pair in pairs]))
  verdicts = [
    verdict(i, question, [next(scored).logp for _ in question.choices])
    for i, (_, question) in enumerate(fitting.usable)
  ]

  def write() -> None:
    jsonl.write(folder / VERDICTS, verdicts, ensure_ascii=True)
    jsonl.write(folder / LEFT_OUT, fitting.left_out, ensure_ascii=True)

  distributed.run_on_process_0(write)
  return {
    "questions": len(verdicts),
    "left_out": len(fitting.left_out),
    "acc": _scores.interval([float(v["chosen"] == v["label"]) for v in verdicts]),
    "acc_norm": _scores.interval([float(v["chosen_norm"] == v["label"]) for v in verdicts]),
  }


def verdict(number: int, question: Choice, logps: Sequence[float]) -> JsonObject:
  """The line of a question: the likeliest choices, the first of equals."""
  chosen = int(np.argmax(logps))
  norm = int(np.argmax(np.asarray(logps) / np.asarray(question.lengths)))
  return {
    "id": number,
    "logps": list(logps),
    "label": question.label,
    "chosen": chosen,
    "chosen_norm": norm,
  }
