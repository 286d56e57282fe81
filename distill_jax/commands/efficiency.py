"""`efficiency`: what the student saves, in bytes, operations and seconds, and what it costs.

Three parts, and each number says which it is of. By formula, from the shapes alone
(efficiency/formulas.py): parameters, bytes, operations, and the fewest seconds of a decode step
at a chip's published peaks, so bounds and not forecasts. Measured here (efficiency/measure.py),
where efficiency.measure is on and the weights are at hand. Quality is copied from the
evaluation.json in the workdir.
"""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.efficiency import comparison, formulas, measure
from distill_jax.efficiency.table import text  # noqa: F401
from distill_jax.models import loading
from distill_jax.nn import sharding
from distill_jax.preflight import programs
from distill_jax.preflight.chips import CHIPS
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject


def run(config: Config, folder: Path) -> JsonObject:
  """Compares config.teacher with config.student, and writes efficiency.json into the workdir.

  Models whose shape is named beside a source are judged by that shape, as preflight does: no
  weight is read but to measure. The student is config.student as training begins with it; a
  trained one has the same shape, and its quality is in evaluation.json under its name.

  Returns: `context`, `chip`, `models` (see formulas.model_costs), `ratios` (see
    comparison.ratios), `measured` (see measure.measure) and `quality`, rows by model; the last two
    None without.

  Raises:
    InputError: a chip, dtype, context or batch size that cannot be; a measurement without
      weights; an evaluation.json that cannot be read.
  """
  options, shapes = config.efficiency, programs.without_weights(config)
  sources = {
    "teacher": loading.open_source(shapes.teacher),
    "student": loading.open_source(shapes.student),
  }
  comparison.check(options, sources)
  mesh = sharding.make_mesh(**vars(config.mesh)) if options.measure else None
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
