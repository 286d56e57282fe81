"""EleutherAI's lm-evaluation-harness over a model of ours.

  from distill_jax.evals.lm_eval import Adapter
  lm_eval.simple_evaluate(model=Adapter("run:runs/demo/distilled"), tasks=["hellaswag"])

Needs the package lm-eval (`pip install 'distill-jax[lm_eval]'`), and so nothing else here
imports this module.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from distill_jax import config
from distill_jax.data import corpus
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.errors import InputError
from distill_jax.evals.likelihood import Pair, Scorer, begun, pair, prefix
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.generation import local as decoding
from distill_jax.generation.stops import Stops
from distill_jax.models import loading
from distill_jax.nn import sharding

try:
  from lm_eval.api.model import LM
except ImportError as e:
  raise InputError(
    f"lm-eval cannot be imported ({e}); run `pip install 'distill-jax[lm_eval]'`"
  ) from e

KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}
ROUND = 64  # a cache is a multiple of so many positions


class Adapter(LM):
  """A model by its source, as teacher.source in a config names one.

  Args:
    source: a folder, a .gguf, "package:…", "hub:…" or "run:WORKDIR".
    batch_size: rows at once; it divides over the mesh's devices.
    max_length: of a text in tokens; 0: what the model reads.
    max_gen_toks: where a task does not say.
    tokenizer: a file or folder; "": the model's own.
    dtype: of matrix products.
    seed: of sampling, where a task samples.
    mesh: devices on its axes, as {"data": 1, "fsdp": -1, "tensor": 1}.
    model: further keys of the config's Model, such as family and shape of a random one.
  """

  def __init__(
    self,
    source: str,
    batch_size: int = 8,
    max_length: int = 0,
    max_gen_toks: int = 256,
    tokenizer: str = "",
    dtype: str = "float32",
    seed: int = 0,
    mesh: dict[str, int] | None = None,
    **model: Any,
  ):
    super().__init__()
    c = config.base()
    c.seed, c.data.tokenizer = seed, tokenizer
    c.teacher.update(source=source, dtype=dtype, **model)
    c.mesh.update(mesh or {})
    c.generate.batch_size = c.generate.prefill_rows = batch_size
    self.config = config.resolve(c)
    self.mesh = sharding.make_mesh(**vars(self.config.mesh))
    sharding.check_batch("batch_size", batch_size, self.mesh)
    self._came = loading.pretrained(self.config.teacher)
    self.tokens = corpus.tokenizer_of(self.config.data, self._came)
    reads = loading.family_and_config(self.config.teacher)[1].max_position_embeddings
    if not 0 <= max_length <= reads:
      raise InputError(f"max_length is {max_length} and this model reads at most {reads} tokens")
    self.max_length, self.max_gen_toks = max_length or reads, max_gen_toks
    self._loaded = ModelSlot(self.config.teacher, self.mesh, loading.keys(seed)["teacher"])

  @property
  def tokenizer_name(self) -> str:
    return self.tokens.digest

  def chat_template(self, chat_template: bool | str = False) -> str:
    return self._template().source if chat_template else ""

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    return self._template().render(chat_history, add_generation_prompt=add_generation_prompt)

  def _template(self) -> ChatTemplate:
    return corpus.template_of(self.config.data, self._came)

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(nats, whether greedy decoding says it) of a continuation after its context."""
    pairs = [pair(self.tokens, *request.args) for request in requests]
    scored = self._scorer()([self._fit(p) for p in pairs])
    self._tell(sum(len(p.given) + len(p.scored) > self.max_length + 1 for p in pairs))
    answers = [(s.logp, s.greedy) for s in scored]
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial("loglikelihood", request.args, answer)
    return answers

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """Nats of whole texts; each token is scored once, after as much of the text as there can be."""
    texts = [self.tokens.encode(request.args[0]) for request in requests]
    windows = [list(rolling(ids, prefix(self.tokens), self.max_length)) for ids in texts]
    scored = iter(self._scorer()([w for of in windows for w in of]))
    answers = [sum(next(scored).logp for _ in of) for of in windows]
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
    return answers

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """What the model goes on with, up to the first of the strings `until`."""
    alike: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
    answers = [""] * len(requests)
    for compute, numbers in alike.items():
      texts = {i: requests[i].args[0] for i in numbers}
      for i, text in self._generate(texts, json.loads(compute)):
        answers[i] = text
        self.cache_hook.add_partial("generate_until", requests[i].args, text)
    return answers

  def _generate(self, texts: dict[int, str], compute: dict[str, Any]) -> Iterator[tuple[int, str]]:
    if strange := set(compute) - KNOWN:
      raise InputError(f"generation is asked for with {min(strange)!r}; known: {sorted(KNOWN)}")
    until = compute.get("until") or []
    stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    room = self.max_length - compute.get("max_gen_toks", self.max_gen_toks)
    if room < 1:
      raise InputError(f"max_gen_toks leaves no room for a prompt in {self.max_length} tokens")
    ids = {i: begun(self.tokens, self.tokens.encode(text)) for i, text in texts.items()}
    self._tell(sum(len(x) > room for x in ids.values()))
    ids = {i: (x or prefix(self.tokens))[-room:] for i, x in ids.items()}
    need = max(map(len, ids.values())) + self.max_length - room
    sampled = compute.get("do_sample", compute.get("temperature", 0) > 0)
    generate = dataclasses.replace(
      self.config.generate,
      stop=stop,
      max_new_tokens=self.max_length - room,
      cache_len=min(-(-need // ROUND) * ROUND, self.max_length),
      temperature=float(compute.get("temperature", 1.0)) if sampled else 0.0,
      top_p=float(compute.get("top_p", 1.0)),
      top_k=compute.get("top_k") or 0,
      min_p=float(compute.get("min_p", 0.0)),
    )
    spec, stops = dataclasses.replace(self.config, generate=generate), Stops(self.tokens, stop)
    with jax.set_mesh(self.mesh):
      batch = decoding.batch_of(spec, self.mesh, self.tokens, stops, ids, *self._loaded.apart())
      for done, _ in batch.run((i, 0) for i in ids):
        for s in done:
          yield s.prompt, stops.text(s.tokens[:-1] if s.reason == "eos" else s.tokens)

  def _scorer(self) -> Scorer:
    c = self.config
    return Scorer(
      self._loaded.whole(), self.mesh, self.tokens, c.generate.batch_size, c.train.chunk
    )

  def _fit(self, of: Pair) -> Pair:
    """Without what is too much at the beginning, as lm-eval's own models cut."""
    room = self.max_length + 1 - len(of.scored)
    if room < 1:
      raise InputError(
        f"a continuation has {len(of.scored)} tokens, and max_length is {self.max_length}"
      )
    return Pair(of.given[-room:], of.scored)

  def _tell(self, cut: int) -> None:
    if cut:
      print(
        f"lm_eval: the beginnings of {cut} texts are cut off, to fit {self.max_length} tokens",
        file=sys.stderr,
      )


def rolling(ids: list[int], first: list[int], longest: int) -> Iterator[Pair]:
  """Pairs that score each token once; the model reads at most `longest` tokens a pair.

  All but the last score as many tokens as they read, the last as many as there are left, after
  as much of the text before them as there is room for.
  """
  for at in range(0, len(ids), longest):
    scored = ids[at : at + longest]
    given = ids[max(0, at + len(scored) - longest - 1) : at] if at else first[-1:]
    yield Pair(given, scored)
