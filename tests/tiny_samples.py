"""Samples in the format of `generate`, and functions that run filters on them."""

import itertools
import json

import numpy as np

from distill_jax import registry
from distill_jax.filters import ComparingFilter


def a_sample(text="so it is 4", **fields):
  about = {k: fields.pop(k) for k in list(fields) if k in ("answer", "test", "entry_point")}
  sample = {"id": 0, "sample": 0, "prompt": "2 + 2?", "about": about, "text": text, "of": 1}
  return sample | {"token_count": 3, "reason": "eos", "logprob_mean": -0.1} | fields


def group(number, texts, of=None, **fields):
  of = of or len(texts)
  return [a_sample(t, id=number, sample=i, of=of, **fields) for i, t in enumerate(texts)]


def judge(name, samples, **fields):
  """Returns the reason why a filter rejects each sample, or None."""
  made = registry.load("filters", name).Filter(**fields)
  made.prepare()
  if isinstance(made, ComparingFilter):
    return compare(made, samples)
  out = by_prompt(made, samples)
  assert [(s["id"], s["sample"]) for s, _ in out] == [(s["id"], s["sample"]) for s in samples]
  return [why for _, why in out]


def by_prompt(made, samples):
  """Returns a filter's verdicts on samples, which it gets a prompt at a time."""
  groups = itertools.groupby(samples, key=lambda sample: sample["id"])
  return [judged for _, samples in groups for judged in made.select(list(samples))]


def compare(made, samples):
  prompts = np.array([sample["id"] for sample in samples], np.uint64)
  signatures = np.array([made.signature(sample) for sample in samples])
  reasons = [None] * len(samples)
  for row, other, value in made.compare(signatures, prompts, np.arange(len(samples))):
    reasons[row] = made.reason(f"prompt {prompts[other]}, sample {samples[other]['sample']}", value)
  return reasons


def kind(why):
  return why and why.partition(": ")[0]


def kinds(name, samples, **fields):
  return [kind(why) for why in judge(name, samples, **fields)]


def write(path, rows):
  path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
