"""Writes LoRA adapters as a folder for the PEFT library."""

from __future__ import annotations

import os

from distill_jax.errors import bad_value
from distill_jax.hub import export_folder
from distill_jax.hub.export import safetensors_header, tokenizer_files
from distill_jax.hub.export_folder import Content
from distill_jax.hub.tensors import InMemory, Shard, tensors_of
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.hub.weights import float_dtype, hf_json
from distill_jax.nn.lora import Adapters, LoraOptions
from distill_jax.types import FamilyConfig

RENAMED = ("vit", "deit")  # transformers 5 has other module names than their checkpoints
SEQ2SEQ = ("t5", "marian")


def export_adapters(
  adapters: Adapters,
  spec: LoraOptions,
  target: str | os.PathLike[str],
  *,
  config: FamilyConfig,
  base: tuple[str, str] | None,
  tokenizer: TokenizerFiles | None,
  card: str,
  dtype: str = "bfloat16",
) -> None:
  """Writes a folder for `peft.PeftModel.from_pretrained(base_model, dir)`.

  The folder appears only when it is complete.

  Args:
    adapters: the adapters of a run.
    spec: the options that they were made with.
    target: the folder to write; it must not exist.
    config: the architecture of the student.
    base: (name, revision) of the base model for PEFT, with "" for no revision; None if PEFT cannot
      load the base model by name.
    tokenizer: see hub.export.export_model.
    card: see hub.export.export_model.
    dtype: see hub.export.export_model.

  Raises:
    InputError: PEFT does not find the layers of the architecture, the target exists, the disk is
      full, or a value is too large for the dtype.
  """
  task = _task_type(config)
  tensors = tensors_of(adapters, float_dtype(dtype))
  about = {
    "peft_type": "LORA",
    "task_type": task,
    "base_model_name_or_path": base[0] if base else None,
    "revision": (base[1] or None) if base else None,
    "r": spec.rank,
    "lora_alpha": spec.alpha,
    "target_modules": list(spec.targets),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  texts = tokenizer_files(tokenizer, card) | {"adapter_config.json": hf_json(about)}
  shard = Shard("adapter_model.safetensors", tuple(tensors), safetensors_header(tensors))
  export_folder.write(target, Content([shard], InMemory(), texts))


def _task_type(config: FamilyConfig) -> str | None:
  """Returns PEFT's name for the task of a model; None if PEFT adds nothing to its forward pass.

  Raises:
    InputError: PEFT does not find the layers of the architecture.
  """
  hf = config.to_hf()
  if (kind := hf["model_type"]) in RENAMED:
    expected = f"'merged' or 'base' for {kind}, whose layers have other names in transformers 5"
    raise bad_value("export.lora", "peft", expected, "Choose one of them")
  if kind in SEQ2SEQ:
    return "SEQ_2_SEQ_LM"
  return "CAUSAL_LM" if hf["architectures"][0].endswith("ForCausalLM") else None
