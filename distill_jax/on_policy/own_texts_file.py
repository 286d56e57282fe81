"""The student's own texts for the report, token by token: own_texts.json in the folder of a run.

The file is written at each diagnosis and has the latest texts of each teacher:

  {"TEACHER": {"step": the step before which they were diagnosed, "texts": [[token, ...], ...]}}

A token is {"text", "predictions"}, as in report/examples.py: the predictions of "teacher" and
"student" are {"p", "top", "kl"}. The `kl` of the student is KL(student || teacher) at its place, or
log q(token) - log p(token) if the scores are stored. A text is cut after TOKENS tokens, of which
each takes about 300 bytes: 3 * 160 * 300 bytes = 144 kB for each teacher.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from distill_jax.records.shard_writer import writing
from distill_jax.runtime import json_io, storage
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.training.metric_writer import spell
from distill_jax.types import JsonObject, PyTree

FILE = "own_texts.json"
CONTEXT, TOKENS = 16, 160  # tokens of the prompt, and all tokens of a text


def write(workdir: Path, step: int, texts: PyTree, spell_token: Callable[[int], bytes]) -> None:
  """Writes the texts of a diagnosis; those of other teachers stay. Process 0 calls it.

  Args:
    workdir: The folder of the run.
    step: The step before which the texts were diagnosed.
    texts: Diagnosed.texts, on the host.
    spell_token: Returns the bytes of a token; see `token_bytes.reader`.
  """
  path = storage.fetched(workdir / FILE)
  found = json_io.read_object(path, "delete the file") if path.is_file() else {}
  rows = range(len(texts["token"]))
  for name, teacher in texts["teachers"].items():
    shown = [list(_tokens(texts, teacher, i, spell_token)) for i in rows if texts["mask"][i].any()]
    found[name] = {"step": step, "texts": shown}
  with writing(path):
    atomic_write(path, json.dumps(found, allow_nan=False))


def _tokens(
  texts: PyTree, teacher: PyTree, row: int, spell_token: Callable[[int], bytes]
) -> Iterator[JsonObject]:
  """Yields the end of the prompt, and the text that the student has sampled after it.

  A character that several tokens spell is shown at the last of them, where it is complete.
  """
  utf8 = codecs.getincrementaldecoder("utf-8")("replace")
  labelled = np.flatnonzero(texts["mask"][row])
  first = int(labelled[0])
  for i in texts["token"][row, max(0, first + 1 - CONTEXT) : first + 1].tolist():
    yield {"text": utf8.decode(spell_token(i)), "predictions": {}}
  for at in labelled[: TOKENS - CONTEXT].tolist():
    kl = float(teacher["reverse_kl"][row, at]) if "reverse_kl" in teacher else math.nan
    predictions = {
      "teacher": _prediction(teacher, row, at, spell_token, 0.0),
      "student": _prediction(texts["student"], row, at, spell_token, kl),
    }
    text = utf8.decode(spell_token(int(texts["label"][row, at])))
    yield {"text": text, "predictions": predictions}


def _prediction(
  model: PyTree, row: int, at: int, spell_token: Callable[[int], bytes], kl: float
) -> JsonObject:
  """Returns what one model predicts at a place; a teacher may lack `logp` and the top tokens."""
  top = []
  if "top_ids" in model:
    pairs = zip(model["top_ids"][row, at].tolist(), model["top_p"][row, at].tolist(), strict=True)
    top = [
      (spell_token(i).decode("utf-8", "backslashreplace"), _digits(min(p, 1.0)))
      for i, p in pairs
      if p != 0
    ]
  p = _digits(math.exp(min(float(model["logp"][row, at]), 0.0))) if "logp" in model else None
  return {"p": p, "top": top, "kl": _digits(kl)}


def _digits(x: float) -> float | str:
  """Returns a number with four digits, as strict JSON allows it."""
  return spell(float(f"{x:.4g}") if math.isfinite(x) else x)
