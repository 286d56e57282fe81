"""Generative benchmarks: sample a model's answers and judge them with a filter."""

from __future__ import annotations

import collections
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from distill_jax.config import Config
from distill_jax.data import jsonl
from distill_jax.errors import InputError, bad_value
from distill_jax.evals import _option_letter, _scores
from distill_jax.evals._base import GenerativeBenchmark
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.evals.questions import Questions
from distill_jax.filters import SampleFilter, answers, code, exact, judge_in_parallel, math
from distill_jax.filters.samples import Sample, Unjudgeable, answer_part
from distill_jax.generation import dispatch, local, outputs
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
  """Samples a model's answers to every question and judges them.

  An interrupted run is resumed. These files are written into `folder`:
    prompts.jsonl: The questions.
    samples/00000.jsonl, …: The answers; see generation/local.py.
    verdicts.jsonl: {id, sample, right, why, answer} for each judged sample.
    left_out.jsonl: {question, reason} for each skipped question or sample.

  Args:
    config: The config.
    model: The model.
    benchmark: The benchmark.
    questions: The benchmark's questions.
    folder: The folder for these files.

  Returns:
    A dict with these keys, on the first process; an empty dict on other processes.
      questions: The number of questions with a judged sample.
      left_out: The number of skipped questions.
      samples: The mean number of samples per question.
      cut_off: The fraction of samples that were cut off at the maximum length. They are judged like
        all others.
      tokens: The mean number of tokens per sample.
    It also contains the scores of `_scores.passed`.

  Raises:
    InputError: If the folder has samples with other settings, or if evaluate.on_bad is "stop" and a
      prompt is too long. See also `dispatch.generate`.
    Preempted: If SIGTERM was received. Finished samples are kept.
  """
  row: JsonObject = {}
  try:
    job = generation_job(config, model, benchmark, folder)
    distributed.run_on_process_0(lambda: _check_same_settings(job, folder))
    _write_prompts(questions, folder)
    dispatch.generate(job, folder, lambda: model.unrolled(job.decoding))
  except InputError as e:
    raise InputError(f"evals.{questions.name}: {e}") from e
  distributed.run_on_process_0(lambda: row.update(_judge(benchmark, questions, folder)))
  return row


def check(
  config: Config, model: ModelSlot, benchmark: GenerativeBenchmark, questions: Questions
) -> None:
  """Checks a benchmark of a local model without reading weights; see `measure`.

  Raises:
    InputError: If a setting does not fit the model, or if evaluate.on_bad is "stop" and a prompt is
      too long.
  """
  with tempfile.TemporaryDirectory(prefix="distill_jax-") as name:
    folder = Path(name)
    try:
      _write_prompts(questions, folder)
      local.check(generation_job(config, model, benchmark, folder))
    except InputError as e:
      raise InputError(f"evals.{questions.name}: {e}") from e


def _write_prompts(questions: Questions, folder: Path) -> None:
  asked = ({"prompt": q.content["prompt"]} for q in questions.usable)  # without answer keys
  jsonl.write(folder / PROMPTS, asked, ensure_ascii=True)


def generation_job(
  config: Config, model: ModelSlot, benchmark: GenerativeBenchmark, folder: Path
) -> GenerationJob:
  """Returns the job that samples answers to the questions in `folder`.

  Prompting and decoding are set in section `generate`, and sampling in section `evaluate` and in
  the benchmark. generate.server serves the teacher; another model is on a server if its source is
  an address.

  Raises:
    InputError: If several samples per question are requested with greedy decoding.
  """
  c, server = config.evaluate, ServerOptions()
  if is_served(model.options):
    url, _, name = model.options.source.partition("#")
    server = dataclasses.replace(config.generate.server, urls=(url,), model=name, top_logprobs=0)
  elif model.is_teacher:
    server = config.generate.server
  samples = benchmark.samples or c.samples
  if samples > 1 and c.temperature == 0:
    raise bad_value(
      "evaluate.temperature",
      c.temperature,
      f"more than 0 for {samples} samples per question, which would all be equal",
      "Set a temperature, or evaluate.samples=1",
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
  """Returns True if a model's source is the address of a server."""
  return options.source.startswith(("http://", "https://"))


def _check_same_settings(job: GenerationJob, folder: Path) -> None:
  """Checks that a folder has no samples with other settings, and writes the settings to a file."""
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
  before = json_io.read_object(file, "Delete the folder") if file.exists() else settings
  for key, value in settings.items():
    if before.get(key) != value:
      raise InputError(
        f"The answers in {folder} were sampled with {key}={before.get(key)!r}, but it is now "
        f"{value!r}. Delete the folder, or choose another --workdir."
      )
  json_io.write_json(file, settings)


def _judge(benchmark: GenerativeBenchmark, questions: Questions, folder: Path) -> JsonObject:
  """Judges the samples in `folder`, writes the verdicts into it, and returns the results."""
  judge = benchmark.judge()
  assert judge is not None
  tally = Tally(questions, _spelling(judge))
  for row in outputs.read(folder, outputs.REJECTED):
    tally.skip(row["id"], row.get("sample"), row["reason"])
  # Samples are judged with the benchmark's current answer keys, not with those of the samples.
  samples = (
    sample | {"about": questions.usable[sample["id"]].content} for sample in outputs.read(folder)
  )
  for sample, verdict in judge_in_parallel(judge, samples):
    tally.add(sample, verdict)
  jsonl.write(folder / VERDICTS, tally.verdicts, ensure_ascii=True)
  jsonl.write(folder / LEFT_OUT, tally.left_out, ensure_ascii=True)
  if not tally.verdicts:
    raise InputError(
      f"evals.{questions.name} has no answer that can be judged. See {folder / LEFT_OUT} for the "
      "reasons."
    )
  return tally.row()


class Tally:
  """Collects verdicts on samples and computes the scores.

  Args:
    questions: The benchmark's questions.
    spell: A function that returns the answer in a sample, with one spelling for equal answers, for
      majority votes. None: no votes.

  Attributes:
    verdicts: {id, sample, right, why, answer} for each judged sample.
    left_out: {question, reason} for each skipped question or sample.
  """

  def __init__(self, questions: Questions, spell: Callable[[Sample], str] | None):
    self.verdicts: list[JsonObject] = []
    self.left_out = [*questions.left_out]
    self._questions, self._spell = questions, spell
    self._right: dict[int, list[bool]] = collections.defaultdict(list)  # by question
    self._answers: dict[int, list[str]] = collections.defaultdict(list)
    self._cut_off = self._tokens = 0

  def skip(self, number: int, sample: int | None, reason: str) -> None:
    """Skips a sample of a question, or all of its samples (None)."""
    where = self._questions.usable[number].where
    which = where if sample is None else f"{where}, sample {sample}"
    self.left_out.append({"question": which, "reason": reason})

  def add(self, sample: Sample, verdict: str | None) -> None:
    """Adds a sample.

    Args:
      sample: The sample.
      verdict: None if it is correct, the reason if it is wrong, or an `Unjudgeable` to skip it.
    """
    number = sample["id"]
    if isinstance(verdict, Unjudgeable):
      self.skip(number, sample["sample"], verdict)
      return
    is_right = verdict is None
    line = {"id": number, "sample": sample["sample"], "right": is_right, "why": verdict}
    if self._spell:
      line["answer"] = self._spell(sample)
      self._answers[number].append(line["answer"])
    self.verdicts.append(line)
    self._right[number].append(is_right)
    self._cut_off += sample["reason"] == "length"
    self._tokens += sample["token_count"]

  def row(self) -> JsonObject:
    """Returns the results; see `measure`."""
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


def _spelling(judge: SampleFilter) -> Callable[[Sample], str] | None:
  """Returns a function for the spelling of answers that a judge considers equal (see `Tally`).

  Answers whose equality only sympy can tell, e.g. "2^3" and "8", are different answers.
  """
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
  return math.spelling(answers.final(answer_part(sample["text"])) or "")
