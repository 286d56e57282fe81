"""The config sections `teacher` and `student`: models, and which parameters are trained."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import bad_value, check_choice
from distill_jax.nn.attention import KERNELS
from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.nn.layers import REMAT
from distill_jax.nn.lora import LoraOptions
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.types import JsonObject

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """A model: its source, its architecture, and how its outputs are computed."""

  source: str = ""
  """Source of the weights: a Hugging Face folder, also at a URL such as gs://bucket/model; a
  `.gguf` file; "package:NAME/PATH" (a file in an installed Python package); "hub:ORG/NAME",
  "hub:ORG/NAME@REVISION"; or "run:WORKDIR" (the last checkpoint of a training run, or the best
  one: "run:WORKDIR@best"). "": random weights of `family` and `shape`."""
  family: str = "llama"
  """Model family of `shape`: a module of distill_jax/models. Only used together with `shape`."""
  shape: str = ""
  """Name of a shape in the family's CONFIGS. Required without a source. With a source, it must be
  the source's shape; `preflight` then does not read the source. "": the shape of the source."""
  digest: str = ""
  """SHA-256 that the weights must have, in hex, as in the manifest of a record store. "": any."""
  keep_layers: tuple[int, ...] = ()
  """Layers of the source to keep, numbered from 0, in this order. (): all layers."""
  changes: JsonObject = dataclasses.field(default_factory=dict)
  """Overrides for fields of the architecture config, e.g. {"num_labels": 10}, or for longer texts
  {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
  "original_max_position_embeddings": 32768}}."""
  new: tuple[str, ...] = ()
  """Hugging Face parameter-name prefixes to initialise randomly instead of loading, e.g.
  ("classifier",)."""
  dtype: str = "float32"
  """Dtype of matrix products and activations: "float32", "bfloat16" or "float16". Norms, softmax
  and losses are computed in float32."""
  param_dtype: str = "float32"
  """Dtype of the parameters in memory: "float32", "bfloat16" or "float16". The moments of the
  optimizer are in float32. Train in float32: an update of less than about 1/500 of a parameter is
  lost in bfloat16, e.g. every update of a norm's scale at common learning rates."""
  remat: str = "none"
  """Activations kept for the backward pass: "none" keeps all except those of norms, activation
  functions and attention scores, "dots" keeps the results of matrix products, "offload" keeps these
  in host memory, "full" keeps only each layer's input. What is not kept is recomputed."""
  attention: str = "auto"
  """Attention kernel: "xla", "splash" (TPU), "cudnn" (GPU), "cudnn_packed" (GPU, not run on one
  yet: it skips the blocks between documents and has no mask), or "auto" for the best of the first
  three that the device and the model support."""
  rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  """Sharding rules that replace rows of nn/sharding.TABLE for this model: a pair (storage, compute)
  of mesh axes by logical axis, e.g. {"experts": ("fsdp", "tensor")}. "": not sharded."""

  def __post_init__(self) -> None:
    for name in ("dtype", "param_dtype"):
      check_choice(name, getattr(self, name), DTYPES, "Correct it")
    check_choice("remat", self.remat, REMAT, "Choose one")
    check_choice("attention", self.attention, KERNELS, "Choose one")


# The values of student.train, and the options of the student that each of them uses.
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

  train: str = "whole"
  """Trained parameters: "whole" (all of them), "frozen" (all except those in `student.frozen`),
  "lora" (low-rank adapters), "shared" (layers that share weights), or "quantised" (all of them,
  with linear weights rounded to integers)."""
  lora: LoraOptions = LoraOptions()
  """Low-rank adapters, for student.train="lora"."""
  share: ShareOptions = ShareOptions()
  """Sharing of weights between layers, for student.train="shared"."""
  quantise: QuantiseOptions = QuantiseOptions()
  """Integer weights, for student.train="quantised" or "shared"."""
  frozen: tuple[str, ...] = ()
  """Hugging Face prefixes of parameters that are not trained and have no optimizer state, e.g.
  ("model.encoder.",), for student.train="frozen"."""

  def __post_init__(self) -> None:
    super().__post_init__()
    check_choice("student.train", self.train, TRAIN, "Choose one")
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    for part in ("lora", "share", "quantise", "frozen"):
      if part not in TRAIN[self.train] and getattr(self, part) != defaults[part]:
        choices = " or ".join(repr(train) for train, parts in TRAIN.items() if part in parts)
        raise bad_value(
          "student.train",
          self.train,
          f"{choices} because student.{part} is set",
          f"Set student.train, or leave student.{part} at its default",
        )

  def as_trained(self, source: str) -> StudentOptions:
    """Returns the options that load a trained student, computed as in training.

    Args:
      source: a run ("run:WORKDIR"), or an exported folder.
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
