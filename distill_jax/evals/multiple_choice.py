"""Multiple-choice benchmarks: a model's answer is the choice with the highest likelihood."""

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
  """Scores every choice of every question.

  These files are written into `folder`:
    verdicts.jsonl: {id, logps, label, chosen, chosen_norm} for each question, with logps in nats.
    left_out.jsonl: {question, reason} for each skipped question.

  Args:
    scorer: Scores texts with the model.
    tokenizer: The model's tokenizer.
    questions: The benchmark's questions.
    folder: The folder for these files.

  Returns:
    questions: The number of scored questions.
    left_out: The number of skipped questions.
    acc: The fraction of questions whose most likely choice is correct, with its interval.
    acc_norm: The same, with log-likelihoods divided by the number of characters of the choice, as
      in lm-evaluation-harness.

  Raises:
    InputError: If evaluate.on_bad is "stop" and a question is too long for the model, or if all
      questions are.
  """
  fitting, by_question = those_that_fit(scorer.max_len, tokenizer, questions)
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


def those_that_fit(
  max_len: int, tokenizer: Tokenizer, questions: Questions
) -> tuple[Questions, list[list[likelihood.Pair]]]:
  """Returns the questions that a model can read, and the choices of each with their context.

  Args:
    max_len: The model's maximum sequence length.
    tokenizer: The model's tokenizer.
    questions: The benchmark's questions.

  Raises:
    InputError: If evaluate.on_bad is "stop" and a question is too long, or if all questions are.
  """
  fitting = Questions(questions.name, questions.policy, left_out=[*questions.left_out])
  by_question: list[list[likelihood.Pair]] = []
  for where, question in questions.usable:
    try:
      pairs = [likelihood.make_pair(tokenizer, question.context, c) for c in question.choices]
      if not all(likelihood.fits(pair, max_len) for pair in pairs):
        raise InputError(f"The question is longer than the model's limit, {max_len} tokens.")
    except InputError as e:
      fitting.skip(where, str(e))
      continue
    fitting.add(where, question)
    by_question.append(pairs)
  fitting.check()
  return fitting, by_question


def verdict(number: int, question: Choice, logps: Sequence[float]) -> JsonObject:
  """Returns a question's line of verdicts.jsonl. Of equally likely choices, the first is chosen.

  Args:
    number: The index of the question.
    question: The question.
    logps: The log-likelihood of each choice in nats.
  """
  chosen = int(np.argmax(logps))
  norm = int(np.argmax(np.asarray(logps) / np.asarray(question.lengths)))
  return {
    "id": number,
    "logps": list(logps),
    "label": question.label,
    "chosen": chosen,
    "chosen_norm": norm,
  }
