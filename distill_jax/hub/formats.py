"""The numbers of an export's weights, chosen by the keys of `export`."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import bad_value, check_choice
from distill_jax.hub.options import ExportOptions
from distill_jax.hub.weights import float_dtype
from distill_jax.nn import grids
from distill_jax.nn.quantise import QuantiseOptions

OF_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = tuple(OF_DTYPE.values())  # of GGUF
QUANTS = {"hf": ("float", *grids.PACKED), "gguf": (*FLOATS, *grids.GGUF)}
DEFAULT = {"hf": "float", "gguf": "F16"}


@dataclasses.dataclass(frozen=True)
class Format:
  """The format of an export and its numbers.

  Attributes:
    name: "hf" or "gguf".
    quant: the numbers of the linear weights of layers, one of QUANTS; see ExportOptions.quant.
    group: the number of inputs that share a scale, for "int8" and "int4"; 0: all of an output.
    embedding: the numbers of the embedding table and the head, one of the values for GGUF.
    rounds: whether weights are rounded to a grid on which they were not trained: linear weights, or
      the embedding table and the head, which are floats in training.
  """

  name: str
  quant: str
  group: int
  embedding: str
  rounds: bool


def choose(options: ExportOptions, trained: QuantiseOptions) -> Format:
  """Returns the format that the keys of `export` choose.

  Args:
    options: the config section `export`.
    trained: the grid on which the student was trained, if any.

  Raises:
    InputError: The keys contradict each other.
  """
  check_choice("export.format", options.format, QUANTS, "Choose one of them")
  for key in ("target_bytes", "calibration_tokens", "group"):
    if (value := getattr(options, key)) < 0:
      raise bad_value(f"export.{key}", value, "0 or a positive number", "Change it")
  if options.lora != "merged" and (options.format != "hf" or options.quant not in ("", "float")):
    key = "quant" if options.format == "hf" else "format"
    expected = f"{'float' if key == 'quant' else 'hf'!r} with export.lora={options.lora!r}"
    raise bad_value(f"export.{key}", getattr(options, key), expected, "Remove one of the keys")
  _check_gguf(options)
  grid = trained.grid if trained.grid in QUANTS[options.format] else DEFAULT[options.format]
  quant = options.quant or grid
  if quant not in (quants := QUANTS[options.format]):
    expected = f"one of {', '.join(quants)} with export.format={options.format!r}"
    raise bad_value("export.quant", quant, expected, "Choose one of them")
  group = _group(options, quant, trained)
  if options.format == "hf":
    table = OF_DTYPE[float_dtype(options.dtype).name]
  else:
    table = "Q8_0" if options.target_bytes else default_embedding(quant)
  table = options.embedding or table
  rounds = quant in grids.GRIDS and (quant, group) != (trained.grid, trained.group)
  return Format(options.format, quant, group, table, rounds or table in grids.GGUF)


def default_embedding(quant: str) -> str:
  """Returns the type of the embedding table and the head for that of the linear weights."""
  return "Q8_0" if quant in grids.GGUF else quant


def _check_gguf(options: ExportOptions) -> None:
  """Checks the keys that only one of the formats has."""
  if options.format == "hf":
    for key, default in (("embedding", ""), ("target_bytes", 0)):
      if value := getattr(options, key):
        expected = f"{default!r} with export.format='hf'"
        raise bad_value(f"export.{key}", value, expected, "Set export.format to 'gguf'")
    return
  if options.embedding:
    check_choice("export.embedding", options.embedding, QUANTS["gguf"], "Choose one of them")
  if options.dtype != ExportOptions().dtype:
    expected = f"{ExportOptions().dtype!r} with export.format='gguf'"
    raise bad_value("export.dtype", options.dtype, expected, "Set export.quant instead")
  if options.target_bytes and options.quant:
    expected = "'' with export.target_bytes, which chooses the numbers"
    raise bad_value("export.quant", options.quant, expected, "Remove one of the keys")
  if options.target_bytes and options.draft:
    expected = "False with export.target_bytes, because rows are added to its embedding table"
    raise bad_value("export.draft", True, expected, "Remove one of the keys")
  if options.target_bytes and not options.calibration_tokens:
    expected = "a number of tokens on which export.target_bytes measures the loss"
    raise bad_value("export.calibration_tokens", 0, expected, "Set it")


def _group(options: ExportOptions, quant: str, trained: QuantiseOptions) -> int:
  """Returns the number of inputs that share a scale."""
  if quant == trained.grid and quant in grids.PACKED:
    if options.group not in (0, trained.group):
      expected = f"{trained.group}, as in student.quantise"
      raise bad_value("export.group", options.group, expected, "Remove the key")
    return trained.group
  if options.group and quant not in grids.PACKED:
    expected = f"0 because the weights are in {quant!r}"
    raise bad_value("export.group", options.group, expected, "Remove the key")
  return options.group
