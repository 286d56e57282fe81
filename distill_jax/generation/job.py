"""A generation job: the model, the prompts, and the sampling settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from distill_jax.config import Config
from distill_jax.data.options import DataOptions
from distill_jax.errors import bad_value
from distill_jax.generation.options import DecodingOptions, ServerOptions
from distill_jax.generation.sampling import Sampling
from distill_jax.models.loading import ModelSource, open_source
from distill_jax.models.options import ModelOptions
from distill_jax.nn.sharding import MeshOptions


@dataclasses.dataclass(frozen=True)
class GenerationJob:
  """Settings for sampling texts from a model on local devices or on a server.

  Attributes:
    model: The model. A model on a server is opened only if its tokenizer is needed.
    data: The config section `data`; data.tokenizer is used.
    mesh: The mesh of local devices.
    decoding: The decoding settings of a local model.
    server: The server of the model. Without a URL, the model is local.
    seed: The seed for sampling and for random weights.
    prompts: The file of prompts.
    field: See GenerateOptions.
    template: See GenerateOptions.
    chat: See GenerateOptions.
    on_bad: See GenerateOptions.
    samples: See GenerateOptions.
    sampling: The sampling settings.
    max_new_tokens: See GenerateOptions.
    stop: See GenerateOptions.
    repetition: See GenerateOptions.
    ignore_eos: See GenerateOptions.
    section: The config section of prompts, samples, max_new_tokens and on_bad, for messages.
    open_model: Returns the model if it may be open already. None: `model` is opened.
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
    """Returns the job of the command `generate`."""
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
    """The model without its weights, opened at its first use."""
    return self.open_model() if self.open_model else open_source(self.model, self.seed)

  def key(self, name: str) -> str:
    """Returns the config key of a field that is also in other sections, for messages."""
    return f"{self.section}.{name}"

  def check(self) -> None:
    """Checks what applies to local and to served models.

    Raises:
      InputError: A number is not positive, or several samples of a prompt would be equal.
    """
    for name in ("samples", "max_new_tokens"):
      if (value := getattr(self, name)) < 1:
        raise bad_value(self.key(name), value, "a positive integer", "Increase it")
    if self.samples > 1 and self.sampling.temperature == 0:
      expected = f"1 with {self.key('temperature')}=0, where all texts of a prompt are equal"
      raise bad_value(self.key("samples"), self.samples, expected, "Set it to 1")
