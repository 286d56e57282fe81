"""Choice of the width of each tensor of a GGUF file, by the loss that rounding it causes.

Each linear weight of each layer is rounded alone, to each width, and KL(float || rounded) is
measured on calibration text. Then every tensor begins at the smallest width, and of the widenings
that still fit, the one that saves the most KL per byte is made, until none fits. The sum of the KLs
is then at most one widening away from the smallest possible one. The losses of tensors only nearly
add up, so that of the whole choice is measured at the end.

Measuring takes one forward pass over the text for each tensor and width: 420 passes for 30 layers
with 7 linear weights. The results are kept in a file of the run, layer by layer, so that none is
measured again after an interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.deployment import calibration, loss, rounding
from distill_jax.deployment.calibration import Calibration
from distill_jax.deployment.rounding import LayerTensor, Width
from distill_jax.errors import bad_value
from distill_jax.hub import gguf_export
from distill_jax.hub.gguf_tensors import Numbers
from distill_jax.hub.tensors import Encoded
from distill_jax.models.runs import Run
from distill_jax.runtime import distributed, json_io
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject, Model

MEASURED = "rounding.json"  # in the folder of the run
ROUNDED = ("Q4_0", "Q8_0")
# The widest, whose loss counts as 0: float16 rounds by at most 2^-12 of a weight, Q8_0 by 2^-8 of
# the largest in a block.
WIDEST = "F16"


def choose_widths(
  config: Config, run: Run, folder: Path, numbers: Numbers
) -> tuple[Numbers, JsonObject]:
  """Chooses the width of each linear weight of layers for export.target_bytes; prints a table.

  Args:
    config: the config, with `data` and `export`.
    run: the run whose student is rounded.
    folder: the run's folder, where the measurements are kept.
    numbers: the types of the other tensors of the file.

  Returns:
    (the types of all tensors, the contents of widths.json).

  Raises:
    InputError: the size cannot be reached, or needs no rounding; llama.cpp does not know the
      student, or it has no tokenizer; or as loss.of_width.
  """
  shapes, target = run.student.abstract, config.export.target_bytes
  tokenizer = corpus.files_of(config.data, run.student.pretrained)

  def file_bytes(numbers: Numbers) -> int:
    files = gguf_export.gguf_files(shapes, tokenizer, run.student.generation, numbers)
    return sum(file.nbytes for file in files)

  smallest = ROUNDED[0]
  numbers = dataclasses.replace(numbers, quant=smallest)
  found = candidates(shapes, numbers)
  fixed = file_bytes(numbers) - sum(c.sizes[smallest] for c in found.values())
  check_target(found, fixed, target)
  tensors = {name: c.tensor for name, c in found.items()}
  mesh = config.mesh.whole_rows().make()
  text = calibration.read_text(config, run.student, mesh)
  key = hashlib.sha256(f"{run.digest} {text.digest}".encode()).hexdigest()
  with jax.set_mesh(mesh):
    model, calibrated = loss.load(config, run, text, mesh)
    model, kls = measure(model, calibrated, tensors, folder / MEASURED, key)
    stored = options(found, kls)
    choice = choose(stored, target - fixed)
    widths = {tensors[name]: Width(width) for name, width in choice.items()}
    model = rounding.round_model(model, widths, Width(numbers.embedding))
    cost = loss.report(calibrated, model, text, f"Rounding to at most {target:,} bytes")
  # The file is named after a width with blocks, which decides the numbers of DeepSeek's latents.
  most = max(ROUNDED, key=list(choice.values()).count)
  numbers = dataclasses.replace(numbers, quant=most, widths=choice)
  content = {
    **cost,
    "target_bytes": target,
    "file_bytes": file_bytes(numbers),
    "embedding": numbers.embedding,
    "tensors": {
      name: {"width": width, "bytes": stored[name][width].nbytes, "kl": kls[name]}
      for name, width in choice.items()
    },
  }
  if distributed.is_process_0():
    print(table(content), file=sys.stderr, flush=True)
  return numbers, content


class Candidate(NamedTuple):
  """A tensor whose width is chosen.

  Attributes:
    tensor: the linear weight.
    sizes: its number of bytes in the file at each width.
  """

  tensor: LayerTensor
  sizes: dict[str, int]


class Stored(NamedTuple):
  """A tensor at one width.

  Attributes:
    nbytes: its size in the file.
    kl: KL(float || rounded) when only this tensor is rounded, in nats per token.
  """

  nbytes: int
  kl: float


Options = Mapping[str, Mapping[str, Stored]]  # by tensor and width
Choice = dict[str, str]  # the width of each tensor


def candidates(model: Model, numbers: Numbers) -> dict[str, Candidate]:
  """Returns the linear weights of the layers of a model, by their names in its GGUF file.

  Args:
    model: the model, or its shapes.
    numbers: the types of the other tensors; `quant` is ROUNDED[0].

  Raises:
    InputError: llama.cpp does not know the model, or blocks do not divide the inputs of a tensor.
  """
  found: dict[str, Candidate] = {}
  for width in (*ROUNDED, WIDEST):  # of the first, with numbers.quant, the names follow
    of_width = dataclasses.replace(numbers, widths=dict.fromkeys(found, width))
    _, planned = gguf_export.plan(model, of_width)
    for t in planned:
      if t.role == "linear":
        (weight, *_), size = t.parts, t.nbytes
        assert isinstance(weight, Encoded)
        layer = LayerTensor(weight.tensor.path, weight.tensor.loop_index[0])
        found.setdefault(t.name, Candidate(layer, {})).sizes[width] = size
  return found


def choose(options: Options, budget: int) -> Choice:
  """Returns the widths of tensors that have at most `budget` bytes together.

  Args:
    options: each tensor at each of its widths.
    budget: the number of bytes, not less than that of all tensors at their smallest widths.
  """
  choice = {name: min(widths, key=lambda w: widths[w].nbytes) for name, widths in options.items()}
  left = budget - total_bytes(options, choice)
  while True:
    best, most = None, 0.0
    for name, widths in options.items():
      now = widths[choice[name]]
      for width, new in widths.items():
        more = new.nbytes - now.nbytes
        if 0 < more <= left and (now.kl - new.kl) / more > most:
          best, most = (name, width, more), (now.kl - new.kl) / more
    if best is None:
      return choice
    choice[best[0]] = best[1]
    left -= best[2]


def options(candidates: Mapping[str, Candidate], kls: Mapping[str, Mapping[str, float]]) -> Options:
  """Returns each tensor at each width, given the KL of each at the widths in ROUNDED."""
  return {
    name: {width: Stored(n, kls[name].get(width, 0.0)) for width, n in c.sizes.items()}
    for name, c in candidates.items()
  }


def total_bytes(options: Options, choice: Choice) -> int:
  """Returns the number of bytes of the tensors of a choice."""
  return sum(options[name][width].nbytes for name, width in choice.items())


def check_target(candidates: Mapping[str, Candidate], fixed: int, target: int) -> None:
  """Checks that a size can be reached, and that something has to be rounded for it.

  Args:
    candidates: the tensors whose width is chosen.
    fixed: the number of bytes of the rest of the file.
    target: export.target_bytes.

  Raises:
    InputError: it is not the case.
  """
  smallest = fixed + sum(min(c.sizes.values()) for c in candidates.values())
  largest = fixed + sum(c.sizes[WIDEST] for c in candidates.values())
  if target < smallest:
    expected = f"at least {smallest}, the size with all linear weights at {ROUNDED[0]}"
    raise bad_value("export.target_bytes", target, expected, "Increase it")
  if target >= largest:
    expected = f"less than {largest}, the size with all linear weights at {WIDEST}"
    action = f"Remove the key, and set export.quant={WIDEST!r}"
    raise bad_value("export.target_bytes", target, expected, action)


def measure(
  model: Model,
  calibrated: Calibration,
  tensors: Mapping[str, LayerTensor],
  file: Path,
  key: str,
) -> tuple[Model, dict[str, dict[str, float]]]:
  """Measures the KL of rounding each tensor alone.

  Args:
    model: the model in float32. The weights of its layers are donated.
    calibrated: the text.
    tensors: the tensors to round by name, layer by layer.
    file: where the measurements are kept.
    key: a digest of all that the measurements depend on; those in the file are used if it is the
      same.

  Returns:
    (the model, the KL of each tensor by name and width).
  """
  kept = json_io.read_object(file, "delete it and run export again") if file.exists() else {}
  kls: dict[str, dict[str, float]] = kept["kl"] if kept.get("key") == key else {}
  left = [name for name in tensors if name not in kls]
  with Progress("measure", len(tensors), "tensors", start=len(tensors) - len(left)) as progress:
    for i, name in enumerate(left):
      tensor, of_width = tensors[name], {}
      for width in ROUNDED:
        model, before = rounding.round_tensor(model, tensor, Width(width))
        of_width[width] = calibrated.loss(model).kl
        model = rounding.put_back(model, tensor, before)
      kls[name] = of_width
      if i + 1 == len(left) or tensors[left[i + 1]].layer != tensor.layer:
        json_io.write_json_once(file, {"key": key, "kl": kls})
      progress.add(1, kl=of_width[ROUNDED[0]])
  return model, kls


def table(content: JsonObject) -> str:
  """Returns the contents of widths.json as a table."""
  rows = content["tensors"]
  longest = max(map(len, rows))
  heads = "".join(f"{f'KL {width}':>12}" for width in ROUNDED)
  lines = [f"{'tensor':{longest}}  width{'bytes':>16}{heads}"]
  for name, row in rows.items():
    kls = "".join(f"{row['kl'][width]:>12.3g}" for width in ROUNDED)
    lines.append(f"{name:{longest}}  {row['width']:5}{row['bytes']:>16,}{kls}")
  return "\n".join(lines)
