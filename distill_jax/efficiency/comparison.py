"""Ratios between the costs of teacher and student, and their quality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill_jax.efficiency import formulas
from distill_jax.efficiency.formulas import ServingCost
from distill_jax.efficiency.options import EfficiencyOptions
from distill_jax.errors import InputError, bad_value, check_choice
from distill_jax.models.loading import ModelSource
from distill_jax.preflight.chips import CHIPS, Chip
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

NOT_QUALITY = ("parameters", "bytes", "tokens_per_second")  # keys of evaluation.json to skip


def check(options: EfficiencyOptions, models: Mapping[str, ModelSource]) -> None:
  """Checks the options.

  Args:
    options: the options of `efficiency`.
    models: the teacher and the student, opened.

  Raises:
    InputError: an option is invalid, or the context is longer than a model supports.
  """
  check_choice("efficiency.chip", options.chip, CHIPS, "Choose one")
  dtypes = {
    "teacher_dtype": options.teacher_dtype,
    "student_dtype": options.student_dtype,
    "cache_dtype": options.cache_dtype,
  }
  for key, dtype in dtypes.items():
    check_choice(f"efficiency.{key}", dtype, formulas.DTYPES, "Choose one")
  if not options.batch_sizes or min(options.batch_sizes) < 1:
    expected = "one or more positive numbers"
    raise bad_value("efficiency.batch_sizes", options.batch_sizes, expected, "Change them")
  if options.rounds < 1:
    raise bad_value("efficiency.rounds", options.rounds, "a positive number", "Change it")
  for name, source in models.items():
    max_len = source.text_config.max_position_embeddings
    if not 1 <= options.context <= max_len:
      expected = f"a number from 1 to {max_len}, the maximum length of the {name}"
      raise bad_value("efficiency.context", options.context, expected, "Change it")


def ratios(
  models: Mapping[str, JsonObject], chip: Chip, costs: Mapping[str, ServingCost]
) -> JsonObject:
  """Returns the ratios of the teacher's costs to the student's.

  Args:
    models: formulas.model_costs by model.
    chip: the chip.
    costs: formulas.serving_cost by model.

  Returns:
    A dict with the keys
      memory: `same_dtype`, the ratio of parameters; `weights`, of bytes in the serving dtypes; and
        `with_cache`, of weights and cache for each batch size.
      flops: operations per token, by phase. This is the speed-up if computation is the bottleneck,
        as is nearly always the case in prefill.
      latency: of one row's token, on one chip (`same_chips`), and on the minimum number of chips
        for each model (`own_chips`).
      throughput_per_chip: decoded tokens per second for each batch size, student to teacher.
  """
  t, s = models["teacher"], models["student"]
  teacher, student = costs["teacher"], costs["student"]
  bounds = list(zip(t["decode_bounds"], s["decode_bounds"], strict=True))
  phases = ("prefill", "decode")
  one_chip = _latency(teacher, chip, 1) / _latency(student, chip, 1)
  own_chips = _latency(teacher, chip, teacher.min_chips(chip, 1)) / _latency(
    student, chip, student.min_chips(chip, 1)
  )
  return {
    "memory": {
      "same_dtype": t["parameters"] / s["parameters"],
      "weights": t["weight_bytes"] / s["weight_bytes"],
      "with_cache": [
        {"batch_size": a["batch_size"], "ratio": a["bytes"] / b["bytes"]} for a, b in bounds
      ],
    },
    "flops": {p: t["flops_per_token"][p] / s["flops_per_token"][p] for p in phases},
    "latency": {"same_chips": one_chip, "own_chips": own_chips},
    "throughput_per_chip": [
      {
        "batch_size": a["batch_size"],
        "ratio": b["tokens_per_second_per_chip"] / a["tokens_per_second_per_chip"],
      }
      for a, b in bounds
    ],
  }


def _latency(cost: ServingCost, chip: Chip, chips: int) -> float:
  """Returns the minimum seconds to decode one row's token."""
  return cost.step_bound(chip, chips, 1).seconds


def quality(evaluation: Path) -> JsonObject | None:
  """Returns the metrics in evaluation.json by model, e.g. "gsm8k.pass@1"; None without the file.

  Raises:
    InputError: the file does not have the form that `evaluate` writes.
  """
  if not evaluation.exists():
    return None
  out: JsonObject = {}
  try:
    tree = json_io.parse_object(evaluation.read_bytes())
    for name, row in tree.get("models", {}).items():
      out[name] = {key: x for key, x in row.items() if key not in NOT_QUALITY}
    for benchmark, rows in tree.get("evals", {}).items():
      for name, row in rows.items():
        out.setdefault(name, {}).update({f"{benchmark}.{key}": x for key, x in row.items()})
  except (InputError, AttributeError) as error:
    raise InputError(
      f"{evaluation} does not contain the results of `evaluate` ({error}). Run `evaluate` again or "
      "move the file."
    ) from error
  return out
