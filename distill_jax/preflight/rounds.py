"""Estimates rounds of `on_policy` on a slice: bytes per device, seconds by part, and the cost.

A round has three parts, one after the other on the same devices:

* generate: the student samples the texts of the round. In memory are the training state, a copy of
  the student for decoding, and the KV caches. Bytes and bounds are by formula (decoding.py).
* score: each teacher of stored scores reads its texts, records.batch_size at once. Bytes and bounds
  are by formula, without activations. With train.online, the teachers are in the training steps
  instead, and `score` is their part of the steps' operations. Servers score at their own speed.
* train: the step is compiled, with rows of generate.cache_len positions, and `teacher` in it.

Every text has the maximum length, and every prompt the length that is left for it: shorter texts
take less time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax

from distill_jax.config import Config
from distill_jax.models import loading
from distill_jax.on_policy import plan, round_schedule, run_setup
from distill_jax.on_policy.prompt_index import TEACHER
from distill_jax.preflight import (
  decoding,
  estimate,
  flops,
  programs,
  round_teachers,
  step_estimate,
)
from distill_jax.preflight.decoding import Decoder
from distill_jax.preflight.round_teachers import OtherTeachers, RoundTeacher
from distill_jax.preflight.topology import Hardware
from distill_jax.types import JsonObject

GENERATE, SCORE, TRAIN = "generate", "score", "train"  # the parts of a round
OF_STATE = ("parameters", "optimizer", "frozen base", "teacher")  # in memory in all parts
OF_STEP = (
  "flops_per_step",
  "flops",
  "collectives",
  "collective_bytes_per_device",
  "bounds",
  "bound_by",
  "step_seconds_bound",
  "mfu_bound",
)


class RoundTexts(NamedTuple):
  """The texts of the largest round of a run.

  Attributes:
    steps: Number of steps that train on them.
    rows: Number of texts.
    prompts: Number of prompts.
    prompt_tokens: Number of tokens of a prompt in a text of maximum length.
    new_tokens: Maximum number of generated tokens of a text.
  """

  steps: int
  rows: int
  prompts: int
  prompt_tokens: int
  new_tokens: int

  @classmethod
  def of(cls, config: Config) -> RoundTexts:
    """Returns the texts of a config's rounds."""
    c, g = config.on_policy, config.generate
    steps = c.every - plan.records_before(c.every, c.records_fraction)
    rows, new_tokens = steps * config.train.batch_size, min(g.max_new_tokens, g.cache_len - 1)
    return cls(steps, rows, -(-rows // g.samples), g.cache_len - new_tokens, new_tokens)


@dataclasses.dataclass(frozen=True)
class Rounds:
  """The rounds of a run on a slice.

  Attributes:
    config: The config.
    texts: The texts of a round.
    step: The compiled training step; see step_estimate.estimate.
    decoder: The student that decodes.
    teachers: The teachers that run on the devices, by name.
    others: The teachers outside the training step.
  """

  config: Config
  texts: RoundTexts
  step: JsonObject
  decoder: Decoder
  teachers: Mapping[str, RoundTeacher]
  others: OtherTeachers

  @classmethod
  def of(cls, config: Config, hardware: Hardware, mesh: jax.sharding.Mesh) -> Rounds:
    """Compiles the training step, and returns the rounds of a config.

    Raises:
      InputError: `on_policy` would raise it for the config, or the mesh does not divide a model.
    """
    plan.check(config)
    round_schedule.check(config)
    run_setup.check(config)
    student = loading.open_source(config.student, config.seed)
    teachers, texts = round_teachers.find(config, student), RoundTexts.of(config)
    others = round_teachers.outside_step(config, teachers, texts.rows, hardware, mesh)
    step = _step(config, teachers, hardware, mesh)
    resident = sum(_state(step).values()) + others.weights
    decoder = Decoder.of(config, student, hardware, mesh, resident)
    return cls(config, texts, step, decoder, teachers, others)

  @property
  def bytes_per_device(self) -> dict[str, dict[str, int]]:
    """The bytes per device by part of a round and purpose."""
    state, need, others = _state(self.step), self.decoder.memory, self.others
    if others.weights:
      state["teachers" if "teacher" in state else "teacher"] = others.weights
    copy = {"decode copy": self.decoder.weights}
    found = {GENERATE: state | copy | {"cache": need.cache, "prompt cache": need.prompt_cache}}
    if others.seconds:
      found[SCORE] = state
    return found | {TRAIN: state | self.step["bytes_per_device"]}

  @property
  def peaks(self) -> dict[str, int]:
    """The bytes per device by part of a round."""
    sums = {part: sum(sizes.values()) for part, sizes in self.bytes_per_device.items()}
    return sums | {TRAIN: self.step["peak_bytes_per_device"] + self.others.weights}

  @property
  def fits(self) -> bool:
    """True if the step fits, and the rows to decode fit in what the state leaves."""
    decoder = self.decoder
    decodes = decoder.options.batch_size <= decoder.largest_batch
    return decodes and self.peaks[TRAIN] <= decoder.hardware.chip.hbm

  @property
  def teacher_share(self) -> float:
    """The online teachers' part of a step's operations."""
    operations = self.step["flops"]
    return operations.get("teacher", 0.0) / sum(operations.values())

  def seconds(self) -> dict[str, float]:
    """Returns the lower bounds of the parts of a round with a step that fits."""
    steps = self.config.on_policy.every * self.step["step_seconds_bound"]
    score = self.others.seconds or steps * self.teacher_share
    train = steps * (1 - self.teacher_share)
    return {GENERATE: self.generate_seconds, SCORE: score, TRAIN: train}

  @property
  def generate_seconds(self) -> float:
    """The lower bound for a round's texts: copying the weights, prompts, and new tokens."""
    decoder, texts, rows = self.decoder, self.texts, self.decoder.options.batch_size
    chip, chips = decoder.hardware.chip, decoder.hardware.num_chips
    gathered = decoder.weights - decoder.memory.stored
    copy = gathered * decoder.mesh.size / chips / chip.ici
    prompts = flops.forward_flops(decoder.source, texts.prompts, texts.prompt_tokens)
    prefill = (prompts.total - prompts.head) / (chips * chip.flops)
    batches = -(-texts.rows // rows)
    return copy + prefill + batches * texts.new_tokens * decoder.bound(rows).seconds

  def chip_hours(self, generate_seconds: float) -> float:
    """Returns the chip-hours of the whole run, with evaluation, for a step that fits.

    Args:
      generate_seconds: The time to generate the texts of a round.
    """
    steps = self.config.train.steps
    sampled = steps - plan.records_before(steps, self.config.on_policy.records_fraction)
    before = (generate_seconds + self.others.seconds) / self.texts.steps
    evaluated = 1 + (estimate.evaluation_share(self.config, TRAIN) or 0)
    seconds = sampled * before + steps * evaluated * self.step["step_seconds_bound"]
    return seconds * self.decoder.hardware.num_chips / 3600


def estimate_rounds(config: Config, hardware: Hardware, mesh: jax.sharding.Mesh) -> JsonObject:
  """Returns the result of `preflight --verb=on_policy`; preflight/rounds_table.py prints it.

  Args:
    config: The config.
    hardware: The slices.
    mesh: The devices.

  Returns:
    A dict with

    * `fits`; `bytes_per_device` by part of a round and purpose; `peak_bytes_per_device` by part;
      and `hbm_bytes_per_device`;
    * `every`, `rows_per_round`, `row_tokens` and `tokens_per_round`: the steps of a round, its
      texts, the positions of a text, and the maximum of generated tokens of a round;
    * `decode`: the bounds of a decode step, `gather`, and `largest_batch`, the maximum number of
      rows that fit in addition to the state;
    * the values of OF_STEP, of a training step;
    * `seconds_per_round`, lower bounds by part; `round_seconds_bound`, their sum, without servers;
    * `tokens_per_second_bound`, of generated tokens; `chip_hours` of the whole run, with evaluation
      (`evaluation_share`);
    * `generate_seconds_assumed` and `chip_hours_assumed`, with a decoder that reaches
      decoding.REACHED of its bound;
    * `served`, True if servers score, and `lag`;
    * `teacher_shares`, the part of the texts that each teacher on the devices scores, by name, and
      `prompts_found`, False if the parts are assumed to be equal.

    Values that depend on the speed of the step are None if it does not fit.

  Raises:
    InputError: `on_policy` would raise it for the config, or the mesh does not divide a model.
  """
  rounds = Rounds.of(config, hardware, mesh)
  texts, decoder = rounds.texts, rounds.decoder
  seconds = rounds.seconds() if rounds.step["step_seconds_bound"] else None
  whole = sum(seconds.values()) if seconds else None
  tokens = texts.rows * texts.new_tokens
  assumed = rounds.generate_seconds / decoding.REACHED
  room = {"gather": decoder.gather, "largest_batch": decoder.largest_batch}
  return {
    "fits": rounds.fits,
    "bytes_per_device": rounds.bytes_per_device,
    "peak_bytes_per_device": rounds.peaks,
    "hbm_bytes_per_device": hardware.chip.hbm,
    "every": config.on_policy.every,
    "rows_per_round": texts.rows,
    "row_tokens": config.generate.cache_len,
    "tokens_per_round": tokens,
    "decode": decoder.speed(decoder.options.batch_size) | room,
    **{key: rounds.step[key] for key in OF_STEP},
    "seconds_per_round": seconds,
    "round_seconds_bound": whole,
    "generate_seconds_assumed": assumed,
    "chip_hours_assumed": rounds.chip_hours(assumed) if whole else None,
    "tokens_per_second_bound": tokens / whole if whole else None,
    "chip_hours": rounds.chip_hours(rounds.generate_seconds) if whole else None,
    "evaluation_share": estimate.evaluation_share(config, TRAIN),
    "served": bool(config.generate.server.urls) and not config.train.online,
    "lag": config.on_policy.lag,
    "teacher_shares": {name: float(t.share) for name, t in rounds.teachers.items()},
    "prompts_found": round_teachers.has_prompts(config),
  }


def _step(
  config: Config,
  teachers: Mapping[str, RoundTeacher],
  hardware: Hardware,
  mesh: jax.sharding.Mesh,
) -> JsonObject:
  """Compiles the training step, with `teacher` in it if it is online."""
  if not config.train.online:
    run = round_teachers.as_training(config)
    program = programs.lower(run, "on_policy", mesh)
    return step_estimate.estimate(run, TRAIN, program, hardware, mesh)
  first = teachers[TEACHER]
  program = programs.lower(first.run, "on_policy", mesh, first.other)
  operations = round_teachers.step_flops(teachers, program.rows)
  return step_estimate.estimate(first.run, TRAIN, program, hardware, mesh, operations)


def _state(step: JsonObject) -> dict[str, int]:
  """Returns the bytes per device that are in memory in all parts of a round."""
  return {name: n for name, n in step["bytes_per_device"].items() if name in OF_STATE}
