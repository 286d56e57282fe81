"""Measures how many tokens of a draft model its teacher accepts, in the programs that use drafts.

  python tools/bench/draft.py --draft=runs/demo/export [--config=configs/demo.py] [--prompts=8]
    [--prompt=64] [--new=64] [--tokens=4] [--threads=CORES] [--vllm=VENV/bin/python]

`distilled` is the folder of --draft, which `export` wrote with export.draft=True. `undistilled` is
the student of the config before training. The draft proposes `tokens` tokens, and the teacher
checks them in one pass. `acceptance_length` is the number of tokens per pass of the teacher: those
accepted, and the one that the teacher adds. It is between 1, if nothing is accepted, and
`tokens` + 1.

The programs are `transformers` (assisted generation) and, with --vllm, vLLM (speculative decoding
with a draft model), run by the Python of a virtual environment that has it. Prompts are the
beginnings of held-out documents of `data`. Texts are `greedy` or `sampled` at temperature 1, and do
not stop at the end of text. In vLLM they are greedy: on CPUs, vLLM 0.32 with a draft divides the
logits of sampled texts by temperatures that it has not set.

`speedup` is the ratio of tokens per second with and without the draft in `transformers`, on the
same prompts, one after the other. `same_tokens` is the share of greedy tokens that equal those of
the teacher alone. `load_before` is the load average at the start: other work changes the speed, but
not the acceptance; use --threads=1 then. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import runpy
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
MODES = ("greedy", "sampled")

VLLM = """
import json, sys
from vllm import LLM, SamplingParams

a = json.loads(sys.argv[1])
llm = LLM(
  model=a["teacher"], dtype="float32", max_model_len=a["length"] + 16, max_num_seqs=1, seed=0,
  enforce_eager=True, disable_log_stats=False, gpu_memory_utilization=0.5,
  speculative_config={"model": a["draft"], "num_speculative_tokens": a["tokens"]},
)
params = SamplingParams(temperature=0.0, max_tokens=a["new"], ignore_eos=True)
llm.generate([{"prompt_token_ids": ids} for ids in a["prompts"]], params, use_tqdm=False)
found = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
drafts, accepted = (found[f"vllm:spec_decode_num_{n}"] for n in ("drafts", "accepted_tokens"))
print(f"RESULT{1 + accepted / drafts}", flush=True)
"""


def prepare(config_file: str, folder: Path, count: int, length: int) -> list[list[int]]:
  """Writes the teacher and the undistilled student as float32 folders; returns the prompts."""
  import jax

  from distill_jax import config as config_lib
  from distill_jax.data import corpus, sources
  from distill_jax.hub import export
  from distill_jax.models import loading, runs
  from distill_jax.nn import sharding

  config = config_lib.resolve(runpy.run_path(config_file)["get_config"]())
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  key = runs.keys(config.seed)["student"]
  for name, options in (("teacher", config.teacher), ("undistilled", config.student)):
    source = loading.open_source(options, config.seed)
    with jax.set_mesh(mesh):
      model = source.load(mesh, key).model
      files = corpus.files_of(config.data, source.pretrained)
      export.export_model(
        model, folder / name, tokenizer=files, generation={}, card="", dtype="float32"
      )
  tokenizer = corpus.tokenizer_of(config.data, source.pretrained)
  heldout = dataclasses.replace(config.data, split="heldout")
  documents = sources.documents(corpus.source_of(heldout))
  return [ids[:length] for t in documents if len(ids := tokenizer.encode(t)) >= length][:count]


def load(folder: str | Path) -> Any:
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  model.generation_config.eos_token_id = None
  return model


def generate(
  teacher: Any, prompts: list[list[int]], new: int, mode: str, draft: Any = None, tokens: int = 0
) -> tuple[list[list[int]], int, float]:
  """Returns (the new tokens of each prompt, the teacher's passes, seconds)."""
  import torch

  passes = 0

  def count(*_: Any) -> None:
    nonlocal passes
    passes += 1

  kwargs: dict[str, Any] = {"max_new_tokens": new, "pad_token_id": 0, "do_sample": False}
  if mode == "sampled":
    kwargs |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
  if draft is not None:
    kwargs["assistant_model"] = draft
    draft.generation_config.num_assistant_tokens = tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
  texts = []
  torch.manual_seed(0)
  hook = teacher.register_forward_hook(count)
  start = time.perf_counter()
  with torch.inference_mode():
    for ids in prompts:
      prompt = torch.tensor([ids])
      out = teacher.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs)
      texts.append(out[0, len(ids) :].tolist())
  seconds = time.perf_counter() - start
  hook.remove()
  return texts, passes, seconds


def same(a: list[list[int]], b: list[list[int]]) -> float:
  """Returns the share of equal tokens."""
  pairs = [x == y for m, n in zip(a, b, strict=True) for x, y in zip(m, n, strict=True)]
  return sum(pairs) / len(pairs)


def in_transformers(
  teacher: Any, drafts: dict[str, Any], prompts: list[list[int]], new: int, tokens: int
) -> dict[str, float]:
  """Returns the figures of assisted generation, by draft and mode."""
  figures = {}
  for mode in MODES:
    generate(teacher, prompts[:1], 2, mode)  # the first call is slower
    alone, _, plain = generate(teacher, prompts, new, mode)
    for name, draft in drafts.items():
      texts, passes, seconds = generate(teacher, prompts, new, mode, draft, tokens)
      key = f"transformers.{name}.{mode}"
      figures[f"{key}.acceptance_length"] = sum(map(len, texts)) / passes
      figures[f"{key}.speedup"] = plain / seconds
      if mode == "greedy":
        figures[f"{key}.same_tokens"] = same(texts, alone)
  return figures


def in_vllm(
  python: str, teacher: Path, drafts: dict[str, str | Path], prompts: list[list[int]], **sizes: int
) -> dict[str, float]:
  """Returns the figures of vLLM's speculative decoding, by draft."""
  settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
  env = os.environ | settings | {"HF_HUB_OFFLINE": "1"}
  env.pop("PYTHONPATH", None)
  figures = {}
  for name, folder in drafts.items():
    about = {"teacher": str(teacher), "draft": str(Path(folder).absolute()), "prompts": prompts}
    about |= sizes | {"length": max(map(len, prompts)) + sizes["new"]}
    line = [python, "-c", VLLM, json.dumps(about)]
    done = subprocess.run(line, env=env, stdout=subprocess.PIPE, check=True, text=True)
    found = next(t for t in done.stdout.splitlines() if t.startswith("RESULT"))
    figures[f"vllm.{name}.greedy.acceptance_length"] = float(found.removeprefix("RESULT"))
  return figures


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--draft", required=True)
  parser.add_argument("--config", default="configs/demo.py")
  parser.add_argument("--prompts", type=int, default=8)
  parser.add_argument("--prompt", type=int, default=64)
  parser.add_argument("--new", type=int, default=64)
  parser.add_argument("--tokens", type=int, default=4)
  parser.add_argument("--threads", type=int, default=CORES)
  parser.add_argument("--vllm", default="")
  args = parser.parse_args()
  os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is imported
  figures: dict[str, float] = {"tokens": args.tokens, "load_before": os.getloadavg()[0]}
  with tempfile.TemporaryDirectory() as work:
    prompts = prepare(args.config, Path(work), args.prompts, args.prompt)
    folders = {"distilled": args.draft, "undistilled": f"{work}/undistilled"}
    drafts = {name: load(folder) for name, folder in folders.items()}
    teacher = load(f"{work}/teacher")
    figures |= in_transformers(teacher, drafts, prompts, args.new, args.tokens)
    if args.vllm:
      del teacher, drafts
      sizes = {"new": args.new, "tokens": args.tokens}
      figures |= in_vllm(args.vllm, Path(work) / "teacher", folders, prompts, **sizes)
  for key, value in figures.items():
    print(f"{key:52}{value:10.3f}")
  print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
