"""Low-rank adapters out to a folder that the PEFT library loads onto their base."""

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
  """Writes a folder for `peft.PeftModel.from_pretrained(base_model, dir)`; whole or not at all.

  Args:
    adapters: of a run, as `lora.init` made them from `spec`.
    target: the folder to make; it must not exist.
    base: (name, revision) by which PEFT finds their model; None where it cannot, and "" for
      no revision.
    tokenizer, card, dtype: as for hub.export.export_model.

  Raises:
    InputError: the target exists, the disk is too full, the dtype cannot hold a value.
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
