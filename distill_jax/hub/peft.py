"""Writes LoRA adapters as a folder for the PEFT library."""

from __future__ import annotations

import os
import pathlib

from distill_jax.hub.export import new_folder, tensor_sources, write_shard, write_tokenizer
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.hub.weights import float_dtype, write_hf_json
from distill_jax.nn.lora import Adapters, LoraOptions


def export_adapters(
  adapters: Adapters,
  spec: LoraOptions,
  target: str | os.PathLike[str],
  *,
  base: tuple[str, str] | None,
  tokenizer: TokenizerFiles | None,
  card: str,
  dtype: str = "bfloat16",
) -> pathlib.Path:
  """Writes a folder for `peft.PeftModel.from_pretrained(base_model, dir)`.

  The folder appears only when it is complete.

  Args:
    adapters: the adapters of a run.
    spec: the options that they were made with.
    target: the folder to write; it must not exist.
    base: (name, revision) of the base model for PEFT, with "" for no revision; None if PEFT cannot
      load the base model by name.
    tokenizer: see hub.export.export_model.
    card: see hub.export.export_model.
    dtype: see hub.export.export_model.

  Returns:
    The absolute path of the folder.

  Raises:
    InputError: The target exists, the disk is full, or a value is too large for the dtype.
  """
  tensors = tensor_sources(adapters, float_dtype(dtype))
  with new_folder(target, tensors) as work:
    if work is not None:
      with (work / "adapter_model.safetensors").open("wb") as f:
        write_shard(f, tensors)
      write_hf_json(
        work / "adapter_config.json",
        {
          "peft_type": "LORA",
          "task_type": "CAUSAL_LM",
          "base_model_name_or_path": base[0] if base else None,
          "revision": (base[1] or None) if base else None,
          "r": spec.rank,
          "lora_alpha": spec.alpha,
          "target_modules": list(spec.targets),
          "lora_dropout": 0.0,
          "bias": "none",
          "fan_in_fan_out": False,
          "inference_mode": True,
        },
      )
      write_tokenizer(work, tokenizer, card)
  return pathlib.Path(target).absolute()
