"""Llama 3.3 70B learns to say what DeepSeek-R1 said and was right.

  C=configs/r1_sft_llama_70b.py
  distill-jax preflight --config=$C --topology=v5p:4x4x4
  distill-jax generate  --config=$C --workdir=runs/r1_sft/generated   # R1 behind vLLM
  distill-jax filter    --config=$C --workdir=runs/r1_sft/filtered
  distill-jax record    --config=$C --workdir=records                 # packs the text, no teacher
  distill-jax train     --config=$C --workdir=runs/r1_sft_llama_70b

What preflight says of a step on v5p:4x4x4, 64 sequences of 32,768 tokens, one a device:

    GiB a device    GB sent   s/step   MFU    tokens/s   chip-hours
     73.0 of 95.74       825    53.34   73%      39,315      3,884

Times are bounds at published peaks, not forecasts; chip-hours are those of 8.6 billion tokens.
"""

import _r1_sft


def get_config():
  return _r1_sft.student(
    "llama", "meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b", fsdp=64, peak_lr=2e-5
  )
