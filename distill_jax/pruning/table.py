"""The description of a pruned student: the printed table and the model card."""

from __future__ import annotations

from typing import Any

from distill_jax.models import GLOBAL, DecoderConfig
from distill_jax.models.options import ModelOptions
from distill_jax.pruning import shapes
from distill_jax.pruning.cut import KeptIndices
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.types import JsonObject

NOTE = "as factors (the folder contains their products)"


def kept_summary(
  options: ShrinkOptions, teacher: DecoderConfig, student: Any, kept: KeptIndices
) -> JsonObject:
  """Returns, by axis, how many indices are kept, of how many, and the method if there is one.

  Args:
    options: the options of `shrink`.
    teacher: the teacher's Config.
    student: the student's Config.
    kept: the kept indices.
  """
  summary: JsonObject = {
    "layers": {
      "kept": len(kept.layers),
      "of": teacher.num_hidden_layers,
      "by": options.layers_by,
      "numbers": list(kept.layers),
    }
  }
  by = {"kv_heads": options.kv_heads_by, "experts": options.experts_by}
  for key in shapes.SIZES:
    if shapes.field(teacher, key):
      summary[key] = {"kept": shapes.count(student, key), "of": shapes.count(teacher, key)}
      if key in by and summary[key]["kept"] < summary[key]["of"]:
        summary[key]["by"] = by[key]
  if options.window:
    window = {"kept": options.window, "of": teacher.max_position_embeddings, "by": "all layers"}
    full = [i for i, kind in enumerate(student.layer_types) if kind == GLOBAL]
    if full:
      window |= {"by": "all layers except", "numbers": full}
    summary["window"] = window
  return summary


def text(result: JsonObject) -> str:
  """Returns the contents of shrink.json as a table."""
  if "candidates" in result:
    return _search_table(result)
  lines = [f"{'model':12}{'parameters':>16}{'bytes':>16}{'held-out ce':>13}"]
  for name, row in result["models"].items():
    lines.append(f"{name:12}{row['parameters']:>16,}{row['bytes']:>16,}{row['ce']:>13.4f}")
  lines += ["", *_kept_lines(result["kept"])]
  for path, f in result["factorised"].items():
    lines.append(
      f"{path}: rank {f['rank']} of {f['of']}, {f['norm_kept']:.1%} of its squared norm; "
      f"{f['bytes']:,} bytes, {f['bytes_as_factors']:,} {NOTE}"
    )
  return "\n".join([*lines, f"folder: {result['dir']}"])


def _kept_lines(kept: JsonObject) -> list[str]:
  lines = []
  for key, k in kept.items():
    if k["kept"] != k["of"]:
      by = f" by {k['by']}" if "by" in k else ""
      which = f": {' '.join(map(str, k['numbers']))}" if "numbers" in k else ""
      lines.append(f"{key}: {k['kept']:,} of {k['of']:,}{by}{which}")
  return lines or ["all parts are kept"]


def _search_table(result: JsonObject) -> str:
  sizes = sorted({k for c in result["candidates"].values() for k in c["kept"]})
  head = "".join(f"{k:>14}" for k in sizes)
  lines = [
    f"{result['target']}: {result['wanted']:,.0f}; teacher {result['teacher']['ce']:.4f} nats",
    f"{'candidate':14}{head}{'parameters':>16}{'tokens/s':>10}{'ce before':>11}{'ce after':>10}",
  ]
  for name, c in sorted(result["candidates"].items(), key=lambda item: item[1]["ce"]):
    row = "".join(f"{c['kept'][k]['kept']:>14,}" if k in c["kept"] else f"{'':14}" for k in sizes)
    rate = f"{c['decode_rate']:>10,.1f}" if "decode_rate" in c else f"{'':10}"
    lines.append(
      f"{name:14}{row}{c['parameters']:>16,}{rate}{c['ce_before']:>11.4f}{c['ce']:>10.4f}"
    )
  best = result["candidates"][result["recommended"]]
  lines.append(
    f"recommended: {result['recommended']}, the best after {result['steps']} steps; untrained in "
    f"{best['dir']}, trained so far in {best['run']}"
  )
  return "\n".join(lines)


def card(teacher: ModelOptions, result: JsonObject) -> str:
  """Returns the model card of the folder (README.md), in Markdown."""
  rows = result["models"]
  lines = [
    "---",
    "library_name: transformers",
    "tags: [knowledge-distillation, distill_jax]",
    "---",
    "# A student before training",
    "",
    f"Cut by `distill-jax shrink` from `{teacher.source or teacher.shape}`. It is the start of a "
    "student's training and has not been trained after the cut.",
    "",
    *(f"- {line}" for line in _kept_lines(result["kept"])),
    *(
      f"- `{path}` approximated at rank {f['rank']} of {f['of']}"
      for path, f in result["factorised"].items()
    ),
    "",
    f"Cross-entropy on {result['heldout_labels']:,} held-out tokens of {result['corpus']}, in nats "
    "per token:",
    "",
    "| model | parameters | ce |",
    "|---|---|---|",
    *(f"| {name} | {row['parameters']:,} | {row['ce']:.4g} |" for name, row in rows.items()),
  ]
  return "\n".join(lines) + "\n"
