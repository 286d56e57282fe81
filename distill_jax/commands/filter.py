"""Filters generated samples, e.g. keeps those with the correct answer.

Reads: filter.samples, a workdir of `generate`, or a .jsonl file or folder (default: the workdir).

Writes: in the workdir: kept/NNNNN.jsonl, with the samples that pass all `filters`;
rejected/NNNNN.jsonl, with the others and the reason for each; and filter.json, with the counts.

Config: filter, filters.

Example:
  distill-jax filter --config=configs/grade_school.py --workdir=runs/grade_school/filtered
"""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.errors import InputError, bad_value
from distill_jax.filters import ComparingFilter, Filter, pipeline
from distill_jax.runtime import distributed, files, storage
from distill_jax.types import JsonObject


def run(config: Config, folder: Path) -> JsonObject:
  """Passes samples through `filters`, in filter.order, and writes the kept and the rejected ones.

  Every line of a file is written to one of the two outputs of its segment, in the same order; a
  file of samples larger than 128 MB is several segments of 64 MB. A rejected sample has a field
  `rejected`: {"by": the filter, "why": the kind of reason, "detail": the reason for this sample}.
  With filter.on_bad="skip", lines that are not samples and samples that a filter cannot judge
  (`filters.Unjudgeable`) are rejected, too.

  An interrupted call is resumed by the next one, and calls with different filter.slice may run at
  the same time. A call without it does what is left, and writes the summary last. If samples have
  changed since, their segments are filtered again.

  Returns:
    samples, kept, rejected, and rejected_by, the counts {filter: {why: n}}. filter.json has the
    same. With filter.slice, they are the numbers of the slice, before `near_duplicates`.

  Raises:
    InputError: There are no samples, or the samples of a prompt are not together; a filter cannot
      use its config or this machine; or filter.on_bad is "stop" and a sample cannot be judged.
    Preempted: SIGTERM was received; finished segments are kept.
  """
  BadInputPolicy("filter.on_bad", config.filter.on_bad)  # checks the value
  filters = _ordered(config)
  distributed.require_one_process("filter", "segments")
  root = storage.location(folder)
  samples = config.filter.samples or root
  for name in pipeline.OUTPUTS:
    if f"{samples.rstrip('/')}/".startswith(f"{files.join(root, name)}/"):
      expected = "samples that this command does not replace"
      raise bad_value("filter.samples", samples, expected, "Choose another --workdir")
  return pipeline.Run(filters, config.filter, samples, folder, root)()


def part(config: Config) -> str:
  """Returns the part of the work of a call; calls of other parts may run at the same time."""
  return f"-{config.filter.slice.replace('/', '-')}" if config.filter.slice else ""


def _ordered(config: Config) -> dict[str, Filter | ComparingFilter]:
  """Returns the filters in filter.order, because the keys of a ConfigDict are not ordered."""
  if not config.filters:
    action = "Add a filter, e.g. c.filters.right = config.filter('math')"
    raise InputError(f"filters is empty; expected at least one filter. {action}.")
  order = config.filter.order or tuple(config.filters)
  if sorted(order) != sorted(config.filters) or (len(order) > 1 and not config.filter.order):
    expected = (
      f"each name in filters once, in the order to apply them ({', '.join(config.filters)})"
    )
    raise bad_value("filter.order", config.filter.order, expected, "Correct it")
  return {name: config.filters[name] for name in order}
