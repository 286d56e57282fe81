"""distill_jax: knowledge distillation, TPU-native.

    import distill_jax as dj

    store = dj.open_store("gs://bucket/records")
    loss, means = dj.fused_loss({"soft": dj.losses.KD()}, hidden_BTD, head_VD, batch)

The names below are the public Python API; docs/api.md shows how they are used. Each is imported
when it is first used, so `import distill_jax` is fast and does not import jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distill_jax.errors import InputError

__version__ = "0.2.0"

if TYPE_CHECKING:
  from distill_jax import config, losses
  from distill_jax.data.packing import pack
  from distill_jax.evals.lm_eval import Adapter as LMEvalAdapter
  from distill_jax.losses import divergences, fused_loss, logits_loss
  from distill_jax.models.standalone import export_model, load_model
  from distill_jax.nn import fused_head
  from distill_jax.nn.sharding import make_mesh
  from distill_jax.records.manifest import Manifest
  from distill_jax.records.recorder import Recorder
  from distill_jax.records.store import Store, open_store
  from distill_jax.schedules import Schedule
  from distill_jax.types import Batch, Inputs, Mean, Output, Targets

# Each public name, and where it is defined: "module" or "module:attribute".
_EXPORTS = {
  "Batch": "types:Batch",
  "Inputs": "types:Inputs",
  "LMEvalAdapter": "evals.lm_eval:Adapter",
  "Manifest": "records.manifest:Manifest",
  "Mean": "types:Mean",
  "Output": "types:Output",
  "Recorder": "records.recorder:Recorder",
  "Schedule": "schedules:Schedule",
  "Store": "records.store:Store",
  "Targets": "types:Targets",
  "config": "config",
  "divergences": "losses.divergences",
  "export_model": "models.standalone:export_model",
  "fused_head": "nn.fused_head",
  "fused_loss": "losses:fused_loss",
  "load_model": "models.standalone:load_model",
  "logits_loss": "losses:logits_loss",
  "losses": "losses",
  "make_mesh": "nn.sharding:make_mesh",
  "open_store": "records.store:open_store",
  "pack": "data.packing:pack",
}

__all__ = [
  "Batch",
  "InputError",
  "Inputs",
  "LMEvalAdapter",
  "Manifest",
  "Mean",
  "Output",
  "Recorder",
  "Schedule",
  "Store",
  "Targets",
  "__version__",
  "config",
  "divergences",
  "export_model",
  "fused_head",
  "fused_loss",
  "load_model",
  "logits_loss",
  "losses",
  "make_mesh",
  "open_store",
  "pack",
]


def __getattr__(name: str) -> Any:
  """Imports a public name when it is first used (PEP 562)."""
  if name not in _EXPORTS:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, _, attribute = _EXPORTS[name].partition(":")
  value = importlib.import_module(f"{__name__}.{module}")
  globals()[name] = getattr(value, attribute) if attribute else value
  return globals()[name]


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
