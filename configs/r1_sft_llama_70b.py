"""Trains Llama 3.3 70B on correct answers that DeepSeek-R1 generated.

  C=configs/r1_sft_llama_70b.py
  distill-jax preflight --config=$C --topology=v5p:4x4x4
  distill-jax generate  --config=$C --workdir=runs/r1_sft/generated   # R1 on a vLLM server
  distill-jax filter    --config=$C --workdir=runs/r1_sft/filtered
  distill-jax pack      --config=$C --workdir=records                 # on CPUs, without teacher
  distill-jax train     --config=$C --workdir=runs/r1_sft_llama_70b

Estimates of preflight for a step on v5p:4x4x4, 64 sequences of 32,768 tokens (one per device):

      GiB/device   s/step   MFU    tokens/s   chip-hours
     73.0 of 95.74    53.34   73%      39,315      3,884

Times are lower bounds from published peaks, not forecasts. Chip-hours are for 8.6 billion tokens.
"""

import _r1_sft


def get_config():
  return _r1_sft.student(
    "llama", "meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b", fsdp=64, peak_lr=2e-5
  )
