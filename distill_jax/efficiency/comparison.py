"""How much less the student costs than the teacher, as ratios, and how good both are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill_jax.efficiency import formulas
from distill_jax.efficiency.formulas import ServingCost
from distill_jax.efficiency.options import EfficiencyOptions
from distill_jax.errors import InputError
from distill_jax.models.loading import ModelSource
from distill_jax.preflight.chips import CHIPS, Chip
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

NOT_QUALITY = ("parameters", "bytes", "tokens_per_second")  # of evaluation.json, computed here


def check(options: EfficiencyOptions, models: Mapping[str, ModelSource]) -> None:
  """Refuses what cannot be computed, by its key."""
  if options.chip not in CHIPS:
    raise InputError(f"efficiency.chip is {options.chip!r}; the chips known are {', '.join(CHIPS)}")
  dtypes = {
    "teacher_dtype": options.teacher_dtype,
    "student_dtype": options.student_dtype,
    "cache_dtype": options.cache_dtype,
  }
  for key, dtype in dtypes.items():
    if dtype not in formulas.DTYPES:
      known = ", ".join(formulas.DTYPES)
      raise InputError(f"efficiency.{key} is {dtype!r}; it can be one of {known}")
  if not options.batch_sizes or min(options.batch_sizes) < 1 or options.rounds < 1:
    raise InputError(
      f"efficiency.batch_sizes is {options.batch_sizes} and efficiency.rounds {options.rounds}; "
      "name one batch size or more, and all these numbers are at least 1"
    )
  for name, source in models.items():
    max_len = source.text_config.max_position_embeddings
    if not 1 <= options.context <= max_len:
      raise InputError(
        f"efficiency.context is {options.context}; it is at least 1, and the {name} has {max_len} "
        "positions"
      )


def ratios(
  models: Mapping[str, JsonObject], chip: Chip, costs: Mapping[str, ServingCost]
) -> JsonObject:
  """Returns how many times less the student takes, and how many times faster it is.

  Args:
    models: by name, formulas.model_costs.
    costs: by name, formulas.serving_cost.

  Returns:
    memory: `same_dtype`, by parameters; `weights`, as they are served; and for each batch size
      weights and cache.
    flops: a token, by phase; where compute is what binds, this is the speed-up, and of prefill
      it always nearly is.
    latency: of one row's token; on as many chips, and on the fewest that hold each model.
    throughput_per_chip: decoded tokens a second, for each batch size.
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
  """The fewest seconds of one row's token."""
  return cost.step_bound(chip, chips, 1).seconds


def quality(evaluation: Path) -> JsonObject | None:
  """Reads, by model, what `evaluate` measured, e.g. "gsm8k.pass@1"; None without the file.

  Names and numbers are evaluate's own.
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
      f"{evaluation} does not hold models and their numbers, as evaluate writes them ({error}); "
      "run evaluate again or move it away"
    ) from error
  return out
