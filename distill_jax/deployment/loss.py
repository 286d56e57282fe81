"""The loss by rounding a run's student for a file.

The student is loaded onto the mesh, in float32: 4 bytes for each parameter, over all devices. It is
freed before the export begins.
"""

from __future__ import annotations

import sys

import jax
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.deployment import calibration, rounding
from distill_jax.deployment.calibration import Calibration, Text
from distill_jax.deployment.rounding import LayerTensor, Width
from distill_jax.models import DecoderConfig
from distill_jax.models.runs import Run
from distill_jax.nn import grids
from distill_jax.runtime import distributed
from distill_jax.types import JsonObject, Model

KEYS = ("kl_to_float", "loss_increase", "calibration_tokens")  # of the summary of an export


def of_width(config: Config, run: Run, width: Width, table: Width) -> JsonObject:
  """Measures the loss by rounding all linear weights of layers to one width, and prints it.

  Weights that were trained on the grid of this width are unchanged. The embedding table and the
  head are always rounded.

  Args:
    config: the config, with `data` and `export`.
    run: the run whose student is rounded.
    width: the width of the linear weights.
    table: the width of the embedding table and the head.

  Returns:
    kl_to_float, loss_increase (nats per token) and calibration_tokens; {} for students other than
    decoders of text, whose loss is not measured.

  Raises:
    InputError: the text cannot be read, or does not fit the student.
  """
  if config.tasks or not isinstance(run.student.config, DecoderConfig):
    _print(
      f"The loss by rounding to {width.numbers} is measured for decoders of text only. Compare the "
      "export with the run by `evaluate`."
    )
    return {}
  mesh = config.mesh.whole_rows().make()
  text = calibration.read_text(config, run.student, mesh)
  with jax.set_mesh(mesh):
    model, calibrated = load(config, run, text, mesh)
    if width == (config.student.quantise.grid, config.student.quantise.group):
      widths, what = {}, f"Rounding the embedding and head to {table.numbers}"
    else:
      widths = {t: width for t in rounding.layer_tensors(model) if not _is_float(t, width)}
      what = f"Rounding to {width.numbers} (the embedding and head to {table.numbers})"
    return report(calibrated, rounding.round_model(model, widths, table), text, what)


def _is_float(tensor: LayerTensor, width: Width) -> bool:
  """Returns whether a weight stays float32: DeepSeek's latents, in a GGUF file with blocks."""
  return width.numbers in grids.GGUF and tensor.path.endswith(".kv_up")


def load(config: Config, run: Run, text: Text, mesh: Mesh) -> tuple[Model, Calibration]:
  """Returns (the student in float32, its predictions of a text)."""
  model = calibration.as_float32(run.load(mesh, run.student.compute))
  chunk, compute = config.evaluate.chunk, run.student.compute
  return model, Calibration(model, text.batches, compute, mesh, chunk, text.vocab_size)


def report(calibrated: Calibration, rounded: Model, text: Text, what: str) -> JsonObject:
  """Returns the loss of a model for the summary, and prints it."""
  loss = calibrated.loss(rounded)
  _print(
    f"{what} costs {loss.kl:.3g} nats per token of KL to the student of the run; the cross-entropy "
    f"changes by {loss.increase:+.3g} (on {text.labels:,} tokens of data)."
  )
  return dict(zip(KEYS, (*loss, text.labels), strict=True))


def _print(line: str) -> None:
  if distributed.is_process_0():
    print(line, file=sys.stderr, flush=True)
