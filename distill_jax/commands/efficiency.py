"""`efficiency`: what the student saves, in bytes, operations and seconds, and what it costs.

Three parts, and each number says which it is of. By formula, from the shapes alone
(formulas.py): parameters, bytes, operations, and the least seconds of a decode step at a chip's
published peaks, so bounds and not forecasts. Measured here (measure.py), where
efficiency.measure is on and the weights are at hand. Quality is copied from the evaluation.json
in the workdir.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.efficiency import formulas, measure
from distill_jax.efficiency.table import text  # noqa: F401
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.preflight import programs
from distill_jax.preflight.chips import CHIPS, Chip
from distill_jax.runtime import distributed, json_io

NAMES = ("teacher", "student")
NOT_QUALITY = ("parameters", "bytes", "tokens_per_second")  # of evaluation.json, told better here


def run(config: Config, folder: Path) -> dict[str, Any]:
  """Compares config.teacher with config.student, and writes efficiency.json into the workdir.

  Models whose shape is named beside a source are judged by that shape, as preflight does: no
  weight is read but to measure. The student is config.student as training begins with it; a
  trained one has the same shape, and its quality is in evaluation.json under its name.

  Returns: `context`, `chip`, `models` (see formulas.model), `ratios` (see `compare`),
    `measured` (see measure.measure) and `quality`, rows by model; the last two None without.

  Raises:
    InputError: a chip, dtype, context or batch size that cannot be; a measurement without
      weights; an evaluation.json that cannot be read.
  """
  c, shapes = config.efficiency, programs.without_weights(config)
  check(config, shapes)
  mesh = sharding.make_mesh(**vars(config.mesh)) if c.measure else None
  if c.measure:
    measure.check(config, mesh)
  quality = _quality(folder / "evaluation.json")
  chip, dtypes = CHIPS[c.chip], {"teacher": c.teacher_dtype, "student": c.student_dtype}
  models = {
    who: formulas.model(
      getattr(shapes, who), chip, c.context, dtypes[who], c.cache_dtype, c.batch_sizes
    )
    for who in NAMES
  }
  result = {
    "context": c.context,
    "chip": c.chip,
    "models": models,
    "ratios": compare(models, chip, *(_served(shapes, who, dtypes[who]) for who in NAMES)),
    "measured": measure.measure(config, mesh) if c.measure else None,
    "quality": quality,
  }
  distributed.run_on_process_0(lambda: json_io.write_json(folder / "efficiency.json", result))
  return result


def _served(shapes: Config, who: str, dtype: str) -> formulas.Served:
  c = shapes.efficiency
  return formulas.served(getattr(shapes, who), c.context, dtype, c.cache_dtype)


def compare(
  models: dict[str, Any], chip: Chip, teacher: formulas.Served, student: formulas.Served
) -> dict[str, Any]:
  """How many times less, and how many times faster, the student is.

  Returns:
    memory: `same_dtype`, by parameters; `weights`, as they are served; and for each batch size
      weights and cache.
    flops: a token, by phase; where compute is what binds, this is the speed-up, and of prefill
      it always nearly is.
    latency: of one row's token; on as many chips, and on the fewest that hold each model.
    throughput_per_chip: decoded tokens a second, for each batch size.
  """
  t, s = (models[who] for who in NAMES)
  pairs = list(zip(t["decode_bounds"], s["decode_bounds"], strict=True))
  of = lambda x, y, key: x[key] / y[key]
  seconds = lambda m, chips: m.step(chip, chips, 1).seconds
  own = seconds(teacher, teacher.chips(chip, 1)) / seconds(student, student.chips(chip, 1))
  return {
    "memory": {
      "same_dtype": of(t, s, "parameters"),
      "weights": of(t, s, "weight_bytes"),
      "with_cache": [{"batch_size": x["batch_size"], "ratio": of(x, y, "bytes")} for x, y in pairs],
    },
    "flops": {k: of(t["flops_per_token"], s["flops_per_token"], k) for k in ("prefill", "decode")},
    "latency": {"same_chips": seconds(teacher, 1) / seconds(student, 1), "own_chips": own},
    "throughput_per_chip": [
      {"batch_size": x["batch_size"], "ratio": of(y, x, "tokens_per_second_per_chip")}
      for x, y in pairs
    ],
  }


def check(config: Config, shapes: Config) -> None:
  """Refuses what cannot be computed, by its key."""
  c = config.efficiency
  if c.chip not in CHIPS:
    raise InputError(f"efficiency.chip is {c.chip!r}; the chips known are {', '.join(CHIPS)}")
  for key in ("teacher_dtype", "student_dtype", "cache_dtype"):
    if getattr(c, key) not in formulas.DTYPES:
      known = ", ".join(formulas.DTYPES)
      raise InputError(f"efficiency.{key} is {getattr(c, key)!r}; it can be one of {known}")
  if not c.batch_sizes or min(c.batch_sizes) < 1 or c.rounds < 1:
    raise InputError(
      f"efficiency.batch_sizes is {c.batch_sizes} and efficiency.rounds {c.rounds}; name one batch "
      "size or more, and all these numbers are at least 1"
    )
  for who in NAMES:
    most = loading.family_and_config(getattr(shapes, who))[1].max_position_embeddings
    if not 1 <= c.context <= most:
      raise InputError(
        f"efficiency.context is {c.context}; it is at least 1, and the {who} has {most} positions"
      )


def _quality(file: Path) -> dict[str, Any] | None:
  """By model, what `evaluate` said of how good it is, of sets as "gsm8k.pass@1"; None without.

  Names and numbers are evaluate's own.
  """
  if not file.exists():
    return None
  out: dict[str, Any] = {}
  try:
    said = json.loads(file.read_text())
    for name, row in said.get("models", {}).items():
      out[name] = {k: x for k, x in row.items() if k not in NOT_QUALITY}
    for of, rows in said.get("evals", {}).items():
      for name, row in rows.items():
        out.setdefault(name, {}).update({f"{of}.{k}": x for k, x in row.items()})
  except (ValueError, AttributeError) as error:
    raise InputError(
      f"{file} does not hold models and their numbers, as evaluate writes them ({error}); run "
      "evaluate again or move it away"
    ) from error
  return out
