"""Samples in the format of `generate`, and functions that run filters on them."""

import json

from distill_jax import registry


def a_sample(text="so it is 4", **fields):
  about = {k: fields.pop(k) for k in list(fields) if k in ("answer", "test", "entry_point")}
  sample = {"id": 0, "sample": 0, "prompt": "2 + 2?", "about": about, "text": text, "of": 1}
  return sample | {"tokens": [1, 2, 3], "reason": "eos", "logprob_mean": -0.1} | fields


def group(number, texts, of=None, **fields):
  of = of or len(texts)
  return [a_sample(t, id=number, sample=i, of=of, **fields) for i, t in enumerate(texts)]


def judge(name, samples, **fields):
  """Returns the reason why a filter rejects each sample, or None."""
  made = registry.load("filters", name).Filter(**fields)
  out = list(made.select(iter(samples)))
  assert [(s["id"], s["sample"]) for s, _ in out] == [(s["id"], s["sample"]) for s in samples]
  return [why for _, why in out]


def kind(why):
  return why and why.partition(": ")[0]


def kinds(name, samples, **fields):
  return [kind(why) for why in judge(name, samples, **fields)]


def write(path, rows):
  path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
