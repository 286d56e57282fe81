"""Sets that are answered in words: samples by `generate`, verdicts by a filter."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.evals import _option_letter, _scores
from distill_jax.evals.questions import Questions, judged
from distill_jax.filters import answers, code, exact
from distill_jax.filters.samples import Bad, Sample, answer_part
from distill_jax.generation import local as decoding
from distill_jax.generation import remote
from distill_jax.generation.options import ServerOptions
from distill_jax.models.options import ModelOptions
from distill_jax.runtime import atomic_io, distributed, json_io

PROMPTS, ASKED, VERDICTS, LEFT_OUT = (
  "prompts.jsonl",
  "asked.json",
  "verdicts.jsonl",
  "left_out.jsonl",
)
HOW = (
  "samples",
  "temperature",
  "top_p",
  "max_new_tokens",
  "cache_len",
  "cache_dtype",
  "stop",
  "repetition",
  "chat",
)  # what decides on answers, beside questions and model
OWN = re.compile(r"\bgenerate\.(samples|temperature|max_new_tokens|on_bad)\b")


def measure(
  config: Config,
  spec: ModelOptions,
  of: Any,
  questions: Questions,
  folder: Path,
  load: decoding.Load,
) -> dict[str, Any]:
  """Asks a model every question, as often as the config says, and judges what it answers.

  In `folder`: prompts.jsonl, what is asked; samples.jsonl, what came, see generate.py;
  verdicts.jsonl, {id, sample, right, why, answer} a sample; left_out.jsonl, the questions and
  samples that do not count. The same command goes on where it was stopped.

  Returns:
    questions; left_out, how many do not count; samples, of each; cut_off, the share of samples
    that ended for want of room, which are judged as they are; tokens, a sample's mean; and the
    numbers of _scores.passed.
    On processes but the first: nothing.

  Raises:
    InputError: the folder's samples were asked for otherwise; evaluate.on_bad is "stop" and a
      prompt is too long for the cache; what `generate` refuses.
    Preempted: SIGTERM came; finished samples are kept.
  """
  config = _asking(config, spec, of, folder)
  distributed.run_on_process_0(lambda: _same(config, folder))
  atomic_io.atomic_write(folder / PROMPTS, _lines(q for _, q in questions.good))
  try:
    if config.generate.server.url:
      remote.generate(config, folder)
    else:
      decoding.generate(config, folder, load)
  except InputError as e:
    said = OWN.sub(r"evaluate.\1", str(e))
    raise InputError(f"evals.{questions.name}: {said}") from e
  row: dict[str, Any] = {}
  distributed.run_on_process_0(lambda: row.update(_judge(of, questions, folder)))
  return row


def _asking(config: Config, spec: ModelOptions, of: Any, folder: Path) -> Config:
  """The config by which `generate` asks."""
  e, server = config.evaluate, config.generate.server
  if is_served(spec):
    url, _, model = spec.source.partition("#")
    server = dataclasses.replace(server, url=url, model=model, top_logprobs=0)
  elif spec is not config.teacher:
    server = ServerOptions()
  samples = of.samples or e.samples
  if samples > 1 and e.temperature == 0:
    raise InputError(
      f"{samples} samples of each question are asked for at evaluate.temperature 0, which makes "
      "them all the same; ask for 1, or set a temperature"
    )
  generate = dataclasses.replace(
    config.generate,
    prompts=str(folder / PROMPTS),
    field="prompt",
    template="",
    samples=samples,
    max_new_tokens=e.max_new_tokens,
    on_bad=e.on_bad,
    temperature=e.temperature,
    top_p=e.top_p,
    top_k=0,
    min_p=0.0,
    stop=of.stop or config.generate.stop,
    ignore_eos=False,
    records_dir="",
    server=server,
  )
  return dataclasses.replace(config, teacher=spec, generate=generate)


def is_served(spec: ModelOptions) -> bool:
  return spec.source.startswith(("http://", "https://"))


def _same(config: Config, folder: Path) -> None:
  """Refuses a folder of samples that were asked for otherwise."""
  now: dict[str, Any] = {name: getattr(config.generate, name) for name in HOW}
  now |= {"seed": config.seed, "dtype": config.teacher.dtype, "extra": config.generate.server.extra}
  now, file = json.loads(json.dumps(now)), folder / ASKED
  was = json.loads(file.read_text()) if file.exists() else now
  for key in now:
    if was.get(key) != now[key]:
      raise InputError(
        f"{folder} holds answers that were asked for with {key} {was.get(key)!r} and it is now "
        f"{now[key]!r}; delete that folder, or choose another --workdir"
      )
  json_io.write_json(file, now)


def _judge(of: Any, questions: Questions, folder: Path) -> dict[str, Any]:
  places, judge, left_out = [where for where, _ in questions.good], of.judge(), questions.left_out
  for row in _read(folder / decoding.REJECTED):
    which = f", sample {row['sample']}" if "sample" in row else ""
    left_out = [*left_out, {"question": places[row["id"]] + which, "reason": row["reason"]}]
  verdicts: list[dict[str, Any]] = []
  right: dict[int, list[bool]] = {}
  said: dict[int, list[str]] = {}
  spell, counts = _spelling(judge), {"samples": 0, "cut_off": 0, "tokens": 0}
  # What is right is what the set says now, and not what it said when the model was asked.
  samples = (s | {"about": questions.good[s["id"]][1]} for s in _read(folder / decoding.SAMPLES))
  for sample, why in judged(judge, samples):
    n, answer = sample["id"], spell(sample) if spell else ""
    if isinstance(why, Bad):
      left_out = [*left_out, {"question": f"{places[n]}, sample {sample['sample']}", "reason": why}]
      continue
    right.setdefault(n, []).append(why is None)
    said.setdefault(n, []).append(answer)
    verdict = {"id": n, "sample": sample["sample"], "right": why is None, "why": why}
    verdicts.append(verdict | ({"answer": answer} if spell else {}))
    counts["samples"] += 1
    counts["cut_off"] += sample["reason"] == "length"
    counts["tokens"] += sample.get("token_count", len(sample.get("tokens", ())))
  atomic_io.atomic_write(folder / VERDICTS, _lines(verdicts))
  atomic_io.atomic_write(folder / LEFT_OUT, _lines(left_out))
  if not verdicts:
    raise InputError(f"evals.{questions.name} has no answer to judge; {folder / LEFT_OUT} says why")
  return {
    "questions": len(right),
    "left_out": len(places) + len(questions.left_out) - len(right),
    "samples": counts["samples"] / len(right),
    "cut_off": counts["cut_off"] / counts["samples"],
    "tokens": counts["tokens"] / counts["samples"],
    **_scores.passed([*right.values()], [*said.values()] if spell else None),
  }


def _spelling(judge: Any) -> Callable[[Sample], str] | None:
  """One spelling for answers that are the same, to vote with; None: they are not voted on."""
  if isinstance(judge, code.Filter):
    return None
  if isinstance(judge, _option_letter.Judge):
    return lambda sample: _option_letter.said(sample["text"])
  if isinstance(judge, exact.Filter) and judge.of != "final":
    last = judge.of == "last line"
    cut = lambda text: text.rpartition("\n")[2] if last else text
    return lambda sample: exact.plain(cut(answer_part(sample["text"]).strip()))
  final = lambda sample: answers.final(answer_part(sample["text"]))
  return lambda sample: answers.canonical(final(sample) or "")


def _read(path: Path) -> list[Sample]:
  return [json.loads(line) for line in path.read_text().split("\n") if line]


def _lines(objects: Any) -> str:
  return "".join(json.dumps(o) + "\n" for o in objects)
