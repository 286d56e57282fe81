"""A request to sample texts: whose, from which prompts, and how."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from distill_jax.config import Config
from distill_jax.data.options import DataOptions
from distill_jax.generation.options import DecodingOptions, ServerOptions
from distill_jax.generation.sampling import Sampling
from distill_jax.models.loading import ModelSource, open_source
from distill_jax.models.options import ModelOptions
from distill_jax.nn.sharding import MeshOptions


@dataclasses.dataclass(frozen=True)
class GenerationJob:
  """A request to sample texts from a model, here or on a server.

  Attributes:
    model: the model that generates. One on a server is opened only where its tokenizer is used.
    open_model: gives the model where it may be open already; None opens it.
    data: names the tokenizer, where it is not the model's own.
    mesh: of the devices here.
    decoding: how texts are decoded here.
    server: where the model is served; without a URL it runs here.
    seed: of the sampling, and of random weights.
    prompts: the file of prompts.
    field, template, chat: see GenerateOptions.
    on_bad: "stop" or "skip", where a prompt cannot be used.
    samples: of each prompt.
    max_new_tokens, stop, repetition, ignore_eos: where a text ends.
    section: the config section that samples, max_new_tokens and on_bad were read from.
  """

  model: ModelOptions
  data: DataOptions = DataOptions()
  mesh: MeshOptions = MeshOptions()
  decoding: DecodingOptions = DecodingOptions()
  server: ServerOptions = ServerOptions()
  seed: int = 0
  prompts: str = ""
  field: str = "prompt"
  template: str = ""
  chat: bool = False
  on_bad: str = "stop"
  samples: int = 1
  sampling: Sampling = Sampling()
  max_new_tokens: int = 256
  stop: tuple[str, ...] = ()
  repetition: int = 0
  ignore_eos: bool = False
  section: str = "generate"
  open_model: Callable[[], ModelSource] | None = None

  @classmethod
  def from_config(cls, config: Config) -> GenerationJob:
    """What the command `generate` samples."""
    c = config.generate
    return cls(
      model=config.teacher,
      data=config.data,
      mesh=config.mesh,
      decoding=c,
      server=c.server,
      seed=config.seed,
      prompts=c.prompts,
      field=c.field,
      template=c.template,
      chat=c.chat,
      on_bad=c.on_bad,
      samples=c.samples,
      sampling=Sampling.from_section("generate", c.temperature, c.top_k, c.top_p, c.min_p),
      max_new_tokens=c.max_new_tokens,
      stop=c.stop,
      repetition=c.repetition,
      ignore_eos=c.ignore_eos,
    )

  @functools.cached_property
  def source(self) -> ModelSource:
    """The model without its weights, opened at its first use: a server's need not be here."""
    return self.open_model() if self.open_model else open_source(self.model, self.seed)

  def key(self, name: str) -> str:
    """The config key of samples, max_new_tokens or on_bad, for errors."""
    return f"{self.section}.{name}"
