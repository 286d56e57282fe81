"""An adapter for EleutherAI's lm-evaluation-harness.

  from distill_jax.evals.lm_eval import Adapter
  lm_eval.simple_evaluate(model=Adapter("run:runs/demo/distilled"), tasks=["hellaswag"])

This module needs the package lm-eval (`pip install 'distill-jax[lm_eval]'`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from distill_jax import config
from distill_jax.data import corpus
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.errors import InputError, bad_value
from distill_jax.evals.likelihood import Pair, Scorer, make_pair, prefix, with_beginning
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.generation import local
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.sampling import Sampling
from distill_jax.generation.scheduler import Task
from distill_jax.generation.stops import Stops
from distill_jax.nn import sharding
from distill_jax.runtime import extras
from distill_jax.types import JsonObject

with extras.needed("lm_eval"):
  from lm_eval.api.model import LM

SUPPORTED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}
CACHE_MULTIPLE = 64  # the length of a cache is a multiple of this


class Adapter(LM):
  """A model for lm_eval.simple_evaluate.

  Args:
    source: The model, as in teacher.source: a folder, a .gguf file, "package:…", "hub:…" or
      "run:WORKDIR".
    batch_size: The number of texts per batch; must be divisible by the number of devices on the
      mesh's data and fsdp axes.
    max_length: The maximum length of a text in tokens. 0: the model's maximum.
    max_gen_toks: The maximum number of generated tokens, for tasks that do not set it.
    tokenizer: A tokenizer's file or folder. "": the model's tokenizer.
    dtype: The dtype of matrix products.
    seed: The seed for tasks that sample.
    mesh: The sizes of the mesh axes, e.g. {"data": 1, "fsdp": -1, "tensor": 1}.
    model: Other keys of the config section `teacher`, e.g. family and shape of a random model.

  Raises:
    InputError: If the model cannot be opened or an argument is invalid.
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
    self.config = config.resolve(c)
    self.mesh = self.config.mesh.whole_rows().make()
    sharding.check_batch("batch_size", batch_size, self.mesh)
    self._batch_size, self._seed = batch_size, seed
    self._model = ModelSlot(self.config.teacher, self.mesh, seed, is_teacher=True)
    self.tokens = self._model.tokenizer(self.config.data)
    max_positions = self._model.source.text_config.max_position_embeddings
    if not 0 <= max_length <= max_positions:
      raise bad_value(
        "max_length", max_length, f"at most {max_positions}, the model's limit", "Reduce it"
      )
    self.max_length, self.max_gen_toks = max_length or max_positions, max_gen_toks

  @property
  def tokenizer_name(self) -> str:
    """The tokenizer's digest, a key for lm-eval's cache of requests."""
    return self.tokens.digest

  def chat_template(self, chat_template: bool | str = False) -> str:
    """Returns the source of the chat template, or "" if lm-eval does not use it."""
    return self._template().source if chat_template else ""

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns the text of a chat; see `ChatTemplate.render`."""
    return self._template().render(chat_history, add_generation_prompt=add_generation_prompt)

  def _template(self) -> ChatTemplate:
    return corpus.template_of(self.config.data, self._model.source.pretrained)

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Scores the continuation of each context.

    Args:
      requests: Instances of lm-eval whose arguments are (context, continuation).

    Returns:
      For each request, the log-likelihood in nats, and True if greedy decoding gives the
      continuation.
    """
    pairs = [make_pair(self.tokens, *request.args) for request in requests]
    scored = self._scorer()([self._cut(p) for p in pairs])
    self._report_cut(sum(len(p.given) + len(p.scored) > self.max_length + 1 for p in pairs))
    answers = [(s.logp, s.greedy) for s in scored]
    self._cache("loglikelihood", requests, answers)
    return answers

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """Scores whole texts.

    Each token is scored once, with the longest context that fits into the model.

    Args:
      requests: Instances of lm-eval whose arguments are (text,).

    Returns:
      The log-likelihood of each text in nats.
    """
    texts = [self.tokens.encode(request.args[0]) for request in requests]
    windows = [list(rolling(ids, prefix(self.tokens), self.max_length)) for ids in texts]
    scored = iter(self._scorer()([pair for pairs in windows for pair in pairs]))
    answers = [sum(next(scored).logp for _ in pairs) for pairs in windows]
    self._cache("loglikelihood_rolling", requests, answers)
    return answers

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Generates a continuation of each context, up to the first of the stop strings `until`.

    Args:
      requests: Instances of lm-eval whose arguments are (context, settings).

    Raises:
      InputError: If a setting is not supported.
    """
    by_settings: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
    answers = [""] * len(requests)
    for settings, numbers in by_settings.items():
      texts = {i: requests[i].args[0] for i in numbers}
      for i, text in self._generate(texts, json.loads(settings)):
        answers[i] = text
        self.cache_hook.add_partial("generate_until", requests[i].args, text)
    return answers

  def _cache(self, kind: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial(kind, request.args, answer)

  def _generate(self, texts: dict[int, str], settings: JsonObject) -> Iterator[tuple[int, str]]:
    """Yields (index, continuation) for each text."""
    if unknown := set(settings) - SUPPORTED:
      raise InputError(
        f"The task uses the generation setting {min(unknown)!r}, which is not supported; supported "
        f"settings are {', '.join(sorted(SUPPORTED))}."
      )
    max_new_tokens = settings.get("max_gen_toks", self.max_gen_toks)
    max_prompt = self.max_length - max_new_tokens
    if max_prompt < 1:
      raise bad_value(
        "max_gen_toks", max_new_tokens, f"less than max_length ({self.max_length})", "Reduce it"
      )
    ids = {i: with_beginning(self.tokens, self.tokens.encode(text)) for i, text in texts.items()}
    self._report_cut(sum(len(x) > max_prompt for x in ids.values()))
    ids = {i: (x or prefix(self.tokens))[-max_prompt:] for i, x in ids.items()}
    job = self._job(settings, max(map(len, ids.values())), self.max_length - max_prompt)
    stops = Stops(self.tokens, job.stop)
    with jax.set_mesh(self.mesh):
      unrolled = self._model.unrolled(job.decoding)
      scheduler = local.make_scheduler(job, self.mesh, self.tokens, stops, *unrolled)
      for finished, _ in scheduler.run(Task(i, 0, x) for i, x in ids.items()):
        for s in finished:
          yield s.task.prompt, stops.text(s.text_tokens)

  def _job(self, settings: JsonObject, prompt_tokens: int, max_new_tokens: int) -> GenerationJob:
    """Returns a job with lm-eval's settings.

    Args:
      settings: The settings of a task.
      prompt_tokens: The maximum length of a prompt.
      max_new_tokens: The maximum length of a continuation.
    """
    until = settings.get("until") or []
    is_sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
    cache_len = -(-(prompt_tokens + max_new_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    return GenerationJob(
      model=self.config.teacher,
      open_model=lambda: self._model.source,
      data=self.config.data,
      mesh=self.config.mesh,
      seed=self._seed,
      decoding=DecodingOptions(
        cache_len=min(cache_len, self.max_length),
        batch_size=self._batch_size,
        prefill_rows=self._batch_size,
      ),
      sampling=Sampling(
        temperature=float(settings.get("temperature", 1.0)) if is_sampled else 0.0,
        top_k=settings.get("top_k") or 0,
        top_p=float(settings.get("top_p", 1.0)),
        min_p=float(settings.get("min_p", 0.0)),
      ),
      max_new_tokens=max_new_tokens,
      stop=tuple(s for s in ([until] if isinstance(until, str) else until) if s),
    )

  def _scorer(self) -> Scorer:
    return Scorer(
      self._model.stacked(),
      self.mesh,
      self.tokens,
      self._batch_size,
      self.config.evaluate.chunk,
    )

  def _cut(self, pair: Pair) -> Pair:
    """Returns a pair without the beginning that does not fit, like lm-eval's models."""
    room = self.max_length + 1 - len(pair.scored)
    if room < 1:
      raise bad_value(
        "max_length",
        self.max_length,
        f"at least {len(pair.scored)}, the length of a continuation in tokens",
        "Use a model with longer sequences",
      )
    return Pair(pair.given[-room:], pair.scored)

  def _report_cut(self, cut: int) -> None:
    if cut:
      print(
        f"lm_eval: {cut} texts are longer than {self.max_length} tokens. Their beginnings are cut.",
        file=sys.stderr,
      )


def rolling(ids: list[int], first: list[int], max_len: int) -> Iterator[Pair]:
  """Yields pairs that together score each token of a text once.

  Each pair scores `max_len` tokens, except for the last one, which scores the rest. The context of
  the first pair is the last token of `first`; the others have as much context as fits into
  `max_len` inputs.

  Args:
    ids: The tokens of the text.
    first: The tokens before the text.
    max_len: The model's maximum length.
  """
  for at in range(0, len(ids), max_len):
    scored = ids[at : at + max_len]
    given = ids[max(0, at + len(scored) - max_len - 1) : at] if at else first[-1:]
    yield Pair(given, scored)
