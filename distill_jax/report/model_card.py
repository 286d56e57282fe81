"""The model card of an exported student: its data, teacher, losses and measured numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill_jax.config import Config
from distill_jax.report import benchmarks
from distill_jax.schedules import Schedule

COLUMNS = ("ce", "perplexity", "kl", "agreement", "parameters")


def card(config: Config, step: int, evaluation: Mapping[str, Any] | None) -> str:
  """Returns README.md in Markdown; without an `evaluation` it says that nothing was measured."""
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
    f"Trained by distill_jax for {step:,} steps of {train.batch_size} sequences.",
    "",
    f"- Teacher: `{config.teacher.source or config.teacher.shape}`",
    f"- Student before training: `{student.source or student.shape}`{kept}",
    *_trained(config),
    *(_entry("Task", name, task) for name, task in config.tasks.items()),
    *([] if config.tasks else [text]),
    f"- Optimiser: AdamW, peak rate {optim.peak_lr:g}, {optim.schedule}, "
    f"weight decay {optim.weight_decay:g}",
    *(_entry("Loss", name, loss) for name, loss in config.losses.items()),
    "",
    *_measured(evaluation),
  ]
  return "\n".join(lines) + "\n"


def _trained(config: Config) -> list[str]:
  """What of the student was trained, where that is adapters or shared layers."""
  lora, share = config.student.lora, config.student.share
  if config.student.train == "lora":
    exported = {
      "merged": "merged into the weights",
      "peft": "alone, for the student before training",
      "base": "not in here: this is the student before training",
    }[config.export.lora]
    on = ", ".join(lora.targets)
    return [f"- LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {on}; {exported}"]
  if config.student.train == "shared":
    deltas = (
      f", each with a difference of rank {share.lora.rank} merged in" if share.lora.rank else ""
    )
    return [f"- Layers: {share.layers} different ones, {share.order}, written out{deltas}"]
  return []


def _entry(kind: str, name: str, entry: Any) -> str:
  """A line about a task or a loss of the config: its module and its keys."""
  values = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
  keys = (f"{k} {v.values if isinstance(v, Schedule) else v}" for k, v in values.items())
  return f"- {kind} `{name}` ({type(entry).__module__.rpartition('.')[2]}): {', '.join(keys)}"


def _measured(evaluation: Mapping[str, Any] | None) -> list[str]:
  if evaluation is None:
    return ["Not measured: run `distill-jax evaluate` and export again with its evaluation.json."]
  evals = evaluation.get("evals")
  rows = [*benchmarks.markdown(evals), ""] if evals else []
  if not evaluation["models"]:
    return rows
  rows += [
    f"Measured on {evaluation['tokens']:,.0f} tokens of {evaluation['corpus']}; "
    "ce and kl in nats a token, kl and agreement with the teacher.",
    "",
    "| model | " + " | ".join(COLUMNS) + " |",
    "|---" * (len(COLUMNS) + 1) + "|",
  ]
  for name, row in evaluation["models"].items():
    numbers = (f"{row[c]:,}" if isinstance(row[c], int) else f"{row[c]:.4g}" for c in COLUMNS)
    rows.append(f"| {name} | " + " | ".join(numbers) + " |")
  return rows
