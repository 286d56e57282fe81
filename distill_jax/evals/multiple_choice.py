"""Sets of choices: the one that a model finds likeliest is what it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.evals import _scores, likelihood
from distill_jax.evals._benchmark import Choice
from distill_jax.evals.questions import Questions
from distill_jax.runtime import atomic_io, distributed

VERDICTS, LEFT_OUT = "verdicts.jsonl", "left_out.jsonl"


def measure(
  scorer: likelihood.Scorer, tokenizer: Tokenizer, questions: Questions, folder: Path
) -> dict[str, Any]:
  """Scores every choice after its context.

  In `folder`: verdicts.jsonl, {id, logps, label, chosen, chosen_norm} a question, in nats;
  left_out.jsonl, the questions that do not count.

  Returns:
    questions; left_out, how many do not count; acc, the likeliest choice is right; acc_norm,
    the likeliest by character of its text is, as in lm-evaluation-harness. With intervals.

  Raises:
    InputError: evaluate.on_bad is "stop" and a question is longer than the model reads, or all
      are.
  """
  fit = Questions(questions.name, questions.on_bad, left_out=[*questions.left_out])
  pairs: list[list[likelihood.Pair]] = []
  for where, question in questions.good:
    try:
      of = [likelihood.pair(tokenizer, question.context, c) for c in question.choices]
      if not all(map(scorer.reads, of)):
        raise InputError(f"it is longer than the {scorer.longest} tokens that the model reads")
    except InputError as e:
      fit.leave_out(where, str(e))
      continue
    fit.good.append((where, question))
    pairs.append(of)
  fit.check()
  scored = iter(scorer([p for of in pairs for p in of]))
  logps = [[next(scored).logp for _ in of] for of in pairs]
  verdicts = [verdict(i, q, logps[i]) for i, (_, q) in enumerate(fit.good)]
  lines = lambda objects: "".join(json.dumps(o) + "\n" for o in objects)
  distributed.run_on_process_0(lambda: atomic_io.atomic_write(folder / VERDICTS, lines(verdicts)))
  distributed.run_on_process_0(
    lambda: atomic_io.atomic_write(folder / LEFT_OUT, lines(fit.left_out))
  )
  hit = lambda name: _scores.interval([float(v[name] == v["label"]) for v in verdicts])
  return {
    "questions": len(verdicts),
    "left_out": len(fit.left_out),
    "acc": hit("chosen"),
    "acc_norm": hit("chosen_norm"),
  }


def verdict(number: int, question: Choice, logps: Sequence[float]) -> dict[str, Any]:
  """What is chosen; of equals, the first."""
  chosen = int(np.argmax(logps))
  norm = int(np.argmax(np.asarray(logps) / np.asarray(question.lengths)))
  return {
    "id": number,
    "logps": list(logps),
    "label": question.label,
    "chosen": chosen,
    "chosen_norm": norm,
  }
