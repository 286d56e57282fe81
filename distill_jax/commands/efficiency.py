"""Compares teacher and student in bytes, operations, decoding speed and quality.

The result has three parts. The first is computed by formula from the shapes of the models:
parameters, bytes, operations, and lower bounds on the time of a decode step at the published peaks
of a chip. The second is measured on this machine, if efficiency.measure is True. The third is the
quality of the models, copied from an evaluation.

Reads: the shapes of `teacher` and `student` (to measure, also their weights), and evaluation.json
in the workdir if it exists.

Writes: efficiency.json in the workdir.

Config: seed, mesh, teacher, student, efficiency.

Example:
  distill-jax efficiency --config=configs/demo.py --workdir=runs/demo --config.efficiency.chip=v5e
"""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.efficiency import comparison, formulas, measure
from distill_jax.efficiency.table import text  # noqa: F401
from distill_jax.models import loading
from distill_jax.preflight import programs
from distill_jax.preflight.chips import CHIPS
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject


def run(config: Config, folder: Path) -> JsonObject:
  """Compares config.teacher with config.student and writes efficiency.json into the workdir.

  If the config has a model's shape next to its source, the shape is used, as in preflight, and the
  weights are read only to measure. The student is config.student before training. The trained
  student has the same shape; its quality is in evaluation.json under its own name.

  Returns:
    `context`, `chip`, `models` (see formulas.model_costs), `ratios` (see comparison.ratios),
    `measured` (see measure.measure; None if nothing was measured) and `quality` (rows by model;
    None without an evaluation).

  Raises:
    InputError: A chip, dtype, context or batch size is not valid, the models to measure lack
      weights, or evaluation.json cannot be read.
  """
  options, shapes = config.efficiency, programs.without_weights(config)
  sources = {
    "teacher": loading.open_source(shapes.teacher),
    "student": loading.open_source(shapes.student),
  }
  comparison.check(options, sources)
  mesh = config.mesh.whole_rows().make() if options.measure else None
  if mesh is not None:
    measure.check(config, mesh)
  quality = comparison.quality(folder / "evaluation.json")
  chip, context, cache_dtype = CHIPS[options.chip], options.context, options.cache_dtype
  dtypes = {"teacher": options.teacher_dtype, "student": options.student_dtype}
  models = {
    name: formulas.model_costs(
      source, chip, context, dtypes[name], cache_dtype, options.batch_sizes
    )
    for name, source in sources.items()
  }
  costs = {
    name: formulas.serving_cost(source, context, dtypes[name], cache_dtype)
    for name, source in sources.items()
  }
  result = {
    "context": context,
    "chip": options.chip,
    "models": models,
    "ratios": comparison.ratios(models, chip, costs),
    "measured": None if mesh is None else measure.measure(config, mesh),
    "quality": quality,
  }
  json_io.write_json_once(folder / "efficiency.json", result)
  return result
