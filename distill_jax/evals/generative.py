"""Benchmarks answered in words: a model's samples, judged by a filter."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from distill_jax.config import Config
from distill_jax.data import jsonl
from distill_jax.errors import InputError
from distill_jax.evals import _option_letter, _scores
from distill_jax.evals._base import GenerativeBenchmark
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.evals.questions import Questions
from distill_jax.filters import Filter, answers, code, exact
from distill_jax.filters.samples import Sample, Unjudgeable, answer_part
from distill_jax.generation import dispatch, outputs
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.options import ServerOptions
from distill_jax.generation.sampling import Sampling
from distill_jax.models.options import ModelOptions
from distill_jax.runtime import distributed, json_io
from distill_jax.types import JsonObject

PROMPTS, SETTINGS = "prompts.jsonl", "asked.json"
VERDICTS, LEFT_OUT = "verdicts.jsonl", "left_out.jsonl"


def measure(
  config: Config,
  model: ModelSlot,
  benchmark: GenerativeBenchmark,
  questions: Questions,
  folder: Path,
) -> JsonObject:
  """Samples a model's answers to every question, and judges them.

  In `folder`: prompts.jsonl, the questions; samples.jsonl, the answers, see generation/local.py;
  verdicts.jsonl, {id, sample, right, why, answer} a sample; left_out.jsonl, the questions and
  samples that do not count. A run that was stopped continues.

  Returns:
    questions; left_out, how many do not count; samples, of each; cut_off, the share of samples
    that ended at the maximum length, which are judged as they are; tokens, a sample's mean; and
    the numbers of _scores.passed.
    On processes but the first: nothing.

  Raises:
    InputError: the folder's samples are of other settings; evaluate.on_bad is "stop" and a
      prompt is too long for the cache; what `dispatch.generate` refuses.
    Preempted: SIGTERM was received; finished samples are kept.
  """
  row: JsonObject = {}
  try:
    job = generation_job(config, model, benchmark, folder)
    distributed.run_on_process_0(lambda: _check_same_settings(job, folder))
    jsonl.write(folder / PROMPTS, (q.content for q in questions.usable), ensure_ascii=True)
    dispatch.generate(job, folder, model.unrolled)
  except InputError as e:
    raise InputError(f"evals.{questions.name}: {e}") from e
  distributed.run_on_process_0(lambda: row.update(_judge(benchmark, questions, folder)))
  return row


def generation_job(
  config: Config, model: ModelSlot, benchmark: GenerativeBenchmark, folder: Path
) -> GenerationJob:
  """The job that samples answers to the questions in `folder`.

  It decodes and prompts as section `generate` says, and samples as `evaluate` and the benchmark
  say. generate.server is the teacher's; another model is served where its source is an address.
  """
  c, server = config.evaluate, ServerOptions()
  if is_served(model.options):
    url, _, name = model.options.source.partition("#")
    server = dataclasses.replace(config.generate.server, url=url, model=name, top_logprobs=0)
  elif model.is_teacher:
    server = config.generate.server
  samples = benchmark.samples or c.samples
  if samples > 1 and c.temperature == 0:
    raise InputError(
      f"{samples} samples of each question are asked for at evaluate.temperature 0, which makes "
      "them all the same; ask for 1, or set a temperature"
    )
  return GenerationJob(
    model=model.options,
    open_model=lambda: model.source,
    data=config.data,
    mesh=config.mesh,
    decoding=config.generate,
    server=server,
    seed=config.seed,
    prompts=str(folder / PROMPTS),
    chat=config.generate.chat,
    on_bad=c.on_bad,
    samples=samples,
    sampling=Sampling.from_section("evaluate", c.temperature, top_p=c.top_p),
    max_new_tokens=c.max_new_tokens,
    stop=benchmark.stop or config.generate.stop,
    repetition=config.generate.repetition,
    section="evaluate",
  )


def is_served(options: ModelOptions) -> bool:
  """Whether a model's source is the address of a server."""
  return options.source.startswith(("http://", "https://"))


def _check_same_settings(job: GenerationJob, folder: Path) -> None:
  """Refuses a folder of samples of other settings; writes these down where there is none."""
  settings = {
    "samples": job.samples,
    "temperature": job.sampling.temperature,
    "top_p": job.sampling.top_p,
    "max_new_tokens": job.max_new_tokens,
    "cache_len": job.decoding.cache_len,
    "cache_dtype": job.decoding.cache_dtype,
    "stop": list(job.stop),
    "repetition": job.repetition,
    "chat": job.chat,
    "seed": job.seed,
    "dtype": job.model.dtype,
    "extra": json.loads(json.dumps(job.server.extra)),
  }
  file = folder / SETTINGS
  before = json_io.read_object(file, "delete that folder") if file.exists() else settings
  for key, value in settings.items():
    if before.get(key) != value:
      raise InputError(
        f"{folder} holds answers that were asked for with {key} {before.get(key)!r} and it is now "
        f"{value!r}; delete that folder, or choose another --workdir"
      )
  json_io.write_json(file, settings)


def _judge(benchmark: GenerativeBenchmark, questions: Questions, folder: Path) -> JsonObject:
  """Judges the samples in `folder`, and writes the verdicts there; returns a row of results."""
  judge = benchmark.judge()
  assert judge is not None
  tally = Tally(questions, _spelling(judge))
  for row in _objects(folder / outputs.REJECTED):
    tally.leave_out(row["id"], row.get("sample"), row["reason"])
  # The answer key is the one that the benchmark has now, not the one of the time of sampling.
  samples = (
    sample | {"about": questions.usable[sample["id"]].content}
    for sample in _objects(folder / outputs.SAMPLES)
  )
  for sample, verdict in judge.select(samples):
    tally.add(sample, verdict)
  jsonl.write(folder / VERDICTS, tally.verdicts, ensure_ascii=True)
  jsonl.write(folder / LEFT_OUT, tally.left_out, ensure_ascii=True)
  if not tally.verdicts:
    raise InputError(f"evals.{questions.name} has no answer to judge; {folder / LEFT_OUT} says why")
  return tally.row()


class Tally:
  """Verdicts on samples, and the numbers that they add up to.

  Attributes:
    verdicts: {id, sample, right, why, answer} of each sample that counts.
    left_out: {question, reason} of each question or sample that does not.

  Args:
    spell: gives one spelling for answers that are the same, to vote with; None: no votes.
  """

  def __init__(self, questions: Questions, spell: Callable[[Sample], str] | None):
    self.verdicts: list[JsonObject] = []
    self.left_out = [*questions.left_out]
    self._questions, self._spell = questions, spell
    self._right: dict[int, list[bool]] = collections.defaultdict(list)  # by question
    self._answers: dict[int, list[str]] = collections.defaultdict(list)
    self._cut_off = self._tokens = 0

  def leave_out(self, number: int, sample: int | None, reason: str) -> None:
    """Counts a sample of a question, or all of them (None), as left out."""
    where = self._questions.usable[number].where
    which = where if sample is None else f"{where}, sample {sample}"
    self.left_out.append({"question": which, "reason": reason})

  def add(self, sample: Sample, verdict: str | None) -> None:
    """Counts a sample. The verdict is why it is wrong, None if it is right, or Unjudgeable."""
    number = sample["id"]
    if isinstance(verdict, Unjudgeable):
      self.leave_out(number, sample["sample"], verdict)
      return
    is_right = verdict is None
    line = {"id": number, "sample": sample["sample"], "right": is_right, "why": verdict}
    if self._spell:
      line["answer"] = self._spell(sample)
      self._answers[number].append(line["answer"])
    self.verdicts.append(line)
    self._right[number].append(is_right)
    self._cut_off += sample["reason"] == "length"
    self._tokens += sample.get("token_count", len(sample.get("tokens", ())))

  def row(self) -> JsonObject:
    """The results, as `measure` returns them."""
    questions, samples = len(self._right), len(self.verdicts)
    answers = [*self._answers.values()] if self._spell else None
    return {
      "questions": questions,
      "left_out": len(self._questions.usable) + len(self._questions.left_out) - questions,
      "samples": samples / questions,
      "cut_off": self._cut_off / samples,
      "tokens": self._tokens / samples,
      **_scores.passed([*self._right.values()], answers),
    }


def _spelling(judge: Filter) -> Callable[[Sample], str] | None:
  """One spelling for answers that a judge takes for the same; None: they are not voted on."""
  if isinstance(judge, code.Filter):
    return None
  if isinstance(judge, _option_letter.Judge):
    return _letter
  if isinstance(judge, exact.Filter) and judge.of != "final":
    return _last_line if judge.of == "last line" else _plain_text
  return _final_answer


def _letter(sample: Sample) -> str:
  return _option_letter.final_letter(sample["text"])


def _plain_text(sample: Sample) -> str:
  return exact.plain(answer_part(sample["text"]).strip())


def _last_line(sample: Sample) -> str:
  return exact.plain(answer_part(sample["text"]).strip().rpartition("\n")[2])


def _final_answer(sample: Sample) -> str:
  return answers.canonical(answers.final(answer_part(sample["text"])) or "")


def _objects(path: Path) -> Iterator[JsonObject]:
  return (line.object() for line in jsonl.read_lines(path))
