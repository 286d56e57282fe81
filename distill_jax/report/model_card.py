"""The model card of an exported student: its data, teacher, losses and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill_jax.config import Config
from distill_jax.report import benchmarks, deployment_view
from distill_jax.report.deployment import Deployment
from distill_jax.report.results import corpus_name
from distill_jax.schedules import Schedule

DRAFT = "- A draft of the teacher for speculative decoding: its tokens, as many rows of the table"
COLUMNS = ("ce", "perplexity", "kl", "agreement", "parameters")


def card(
  config: Config,
  step: int,
  evaluation: Mapping[str, Any] | None,
  deployed: Deployment | None = None,
) -> str:
  """Returns the model card in Markdown, with the results that are given."""
  student, data, optim, train = config.student, config.data, config.optim, config.train
  kept = f", layers {list(student.keep_layers)}" if student.keep_layers else ""
  text = f"- Data: `{data.kind}` `{data.path}`, sequences of {data.seq_len} tokens"
  lines = [
    "---",
    f"library_name: {'peft' if config.export.lora == 'peft' else 'transformers'}",
    "tags: [knowledge-distillation, distill_jax]",
    "---",
    "# A distilled student",
    "",
    f"Trained with distill_jax for {step:,} steps with {train.batch_size} sequences per step.",
    "",
    f"- Teacher: `{config.teacher.source or config.teacher.shape}`",
    f"- Student before training: `{student.source or student.shape}`{kept}",
    *_trained(config),
    *(_entry("Task", name, task) for name, task in config.tasks.items()),
    *([] if config.tasks else [text]),
    f"- Optimizer: AdamW, peak learning rate {optim.peak_lr:g}, {optim.schedule} schedule, "
    f"weight decay {optim.weight_decay:g}",
    *([DRAFT] if config.export.draft else []),
    *(_entry("Loss", name, loss) for name, loss in config.losses.items()),
    "",
    *_measured(evaluation),
    *(["", *deployment_view.markdown(deployed)] if deployed is not None else []),
  ]
  return "\n".join(lines) + "\n"


def _trained(config: Config) -> list[str]:
  """Returns a line about the adapters or shared layers that were trained; [] otherwise."""
  lora, share = config.student.lora, config.student.share
  if config.student.train == "lora":
    exported = {
      "merged": "merged into the weights",
      "peft": "adapters only, to load on top of the student before training",
      "base": "not included, since this is the student before training",
    }[config.export.lora]
    on = ", ".join(lora.targets)
    return [f"- LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {on}; {exported}"]
  if config.student.train == "shared":
    deltas = (
      f", each with a merged LoRA difference of rank {share.lora.rank}" if share.lora.rank else ""
    )
    return [f"- Shared layers: {share.layers} distinct layers ({share.order}), repeated{deltas}"]
  return []


def _entry(kind: str, name: str, entry: Any) -> str:
  """Returns a line about a task or a loss of the config: its module and its keys."""
  values = {f.name: _plain(getattr(entry, f.name)) for f in dataclasses.fields(entry)}
  keys = (f"{key} {value}" for key, value in values.items() if value not in ("", (), {}))
  return f"- {kind} `{name}` ({type(entry).__module__.rpartition('.')[2]}): {', '.join(keys)}"


def _plain(value: Any) -> Any:
  """Returns a value of an entry; the number of a constant schedule, else its points."""
  if not isinstance(value, Schedule):
    return value
  return value.points[0][1] if len(value.points) == 1 else value.points


def _measured(evaluation: Mapping[str, Any] | None) -> list[str]:
  if evaluation is None:
    return [
      "This model has not been evaluated. Run `distill-jax evaluate`, set `export.evaluation` to "
      "its evaluation.json, and export again."
    ]
  evals = evaluation.get("evals")
  rows = [*benchmarks.markdown(evals), ""] if evals else []
  if texts := evaluation.get("texts"):
    rows += [f"On {corpus_name(texts)}: {benchmarks.bits_per_byte(texts)}.", ""]
  if not evaluation["models"]:
    return rows
  rows += [
    f"Evaluated on {evaluation['tokens']:,.0f} held-out tokens of {corpus_name(evaluation)}. "
    "Cross-entropy (ce) and KL divergence (kl) are in nats per token; kl and top-1 agreement "
    "compare with the teacher.",
    "",
    "| model | " + " | ".join(COLUMNS) + " |",
    "|---" * (len(COLUMNS) + 1) + "|",
  ]
  for name, row in evaluation["models"].items():
    numbers = (f"{row[c]:,}" if isinstance(row[c], int) else f"{row[c]:.4g}" for c in COLUMNS)
    rows.append(f"| {name} | " + " | ".join(numbers) + " |")
  return rows
