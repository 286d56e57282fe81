"""Which models, where they come from, and what of the student is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.nn.lora import LoraOptions
from distill_jax.nn.quantise import QuantiseOptions


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """Where a model comes from and how it is computed."""

  source: str = ""  # a folder, a .gguf, "package:…", "hub:…", "run:WORKDIR"; "": random weights
  family: str = "llama"  # without a source: a module of distill_jax/models …
  shape: str = ""  # … and one of its named shapes; beside a source, what preflight goes by
  digest: str = ""  # the sha256 that the source must have (a store's manifest names it); "": any
  keep_layers: tuple[int, ...] = ()  # layers of the source to keep; (): all
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of the family's Config
  # that are not as the source or the named shape has them, as {"num_labels": 10}
  new: tuple[str, ...] = ()  # beginnings of Hugging Face's names of parameters that start random,
  # whatever the source holds, as "classifier"
  dtype: str = "float32"  # of matrix products
  param_dtype: str = "float32"  # of the stored parameters
  remat: str = "none"  # none | dots | offload | full
  attention: str = "auto"  # auto | xla | splash | cudnn
  rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # rows of
  # sharding.TABLE that are this model's own: {"experts": ("fsdp", "tensor")}


@dataclasses.dataclass(frozen=True)
class StudentOptions(ModelOptions):
  """The model that is trained."""

  lora: LoraOptions = LoraOptions()
  share: ShareOptions = ShareOptions()
  quantise: QuantiseOptions = QuantiseOptions()
  frozen: tuple[str, ...] = ()  # beginnings of Hugging Face's names of parameters that stay as
  # they are, as "model.encoder.", without optimizer state
