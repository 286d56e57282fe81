"""Which models, where they come from, and what of the student is trained."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import InputError
from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.nn.lora import LoraOptions
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.types import JsonObject


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """Where a model comes from and how it is computed."""

  source: str = ""  # a folder, a .gguf, "package:…", "hub:…", "run:WORKDIR"; "": random weights
  family: str = "llama"  # without a source: a module of distill_jax/models …
  shape: str = ""  # … and one of its named shapes; beside a source, what preflight goes by
  digest: str = ""  # the sha256 that the source must have (a store's manifest names it); "": any
  keep_layers: tuple[int, ...] = ()  # layers of the source to keep; (): all
  changes: JsonObject = dataclasses.field(default_factory=dict)  # overrides for fields of the
  # architecture config, e.g. {"num_labels": 10}
  new: tuple[str, ...] = ()  # Hugging Face parameter-name prefixes to initialise randomly instead
  # of loading, e.g. "classifier"
  dtype: str = "float32"  # of matrix products
  param_dtype: str = "float32"  # of the stored parameters
  remat: str = "none"  # none | dots | offload | full
  attention: str = "auto"  # auto | xla | splash | cudnn
  rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # rows of
  # sharding.TABLE that are this model's own: {"experts": ("fsdp", "tensor")}


# What student.train can be, and the options of the student that it uses. Integers may be shared.
TRAIN: dict[str, tuple[str, ...]] = {
  "whole": (),
  "lora": ("lora",),
  "shared": ("share", "quantise"),
  "quantised": ("quantise",),
  "frozen": ("frozen",),
}


@dataclasses.dataclass(frozen=True)
class StudentOptions(ModelOptions):
  """The model that is trained."""

  train: str = "whole"  # what of it: whole | lora | shared | quantised | frozen (all but `frozen`);
  # of the four keys below, those of another choice stay at their defaults
  lora: LoraOptions = LoraOptions()
  share: ShareOptions = ShareOptions()
  quantise: QuantiseOptions = QuantiseOptions()  # with train "quantised", or "shared"
  frozen: tuple[str, ...] = ()  # Hugging Face parameter-name prefixes that are not trained and
  # have no optimizer state, e.g. "model.encoder."

  def __post_init__(self) -> None:
    if self.train not in TRAIN:
      raise InputError(f"student.train is {self.train!r}; expected one of {', '.join(TRAIN)}")
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    for part in ("lora", "share", "quantise", "frozen"):
      if part not in TRAIN[self.train] and getattr(self, part) != defaults[part]:
        choices = " or ".join(repr(train) for train, parts in TRAIN.items() if part in parts)
        raise InputError(
          f"student.{part} is set and student.train is {self.train!r}; expected {choices}. Set "
          f"student.train, or leave student.{part} at its default"
        )

  def as_trained(self, source: str) -> StudentOptions:
    """The options to load a trained student with, computed as it was in training.

    Args:
      source: a run, or a folder that was exported.
    """
    return dataclasses.replace(
      self,
      source=source,
      keep_layers=(),
      changes={},
      new=(),
      train="whole" if self.quantise == QuantiseOptions() else "quantised",
      lora=LoraOptions(),
      share=ShareOptions(),
      frozen=(),
    )
