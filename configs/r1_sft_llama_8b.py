"""Llama 3.1 8B learns to say what DeepSeek-R1 said and was right.

  C=configs/r1_sft_llama_8b.py
  distill-jax preflight --config=$C --topology=v5p:4x4x4
  distill-jax generate  --config=$C --workdir=runs/r1_sft/generated   # R1 behind vLLM
  distill-jax filter    --config=$C --workdir=runs/r1_sft/filtered
  distill-jax record    --config=$C --workdir=records                 # packs the text, no teacher
  distill-jax train     --config=$C --workdir=runs/r1_sft_llama_8b

What preflight says of a step on v5p:4x4x4, 64 sequences of 32,768 tokens, one a device:

    GiB a device    GB sent   s/step   MFU    tokens/s   chip-hours
     19.9 of 95.74        61     6.97   73%     300,853        508

Times are bounds at published peaks, not forecasts; chip-hours are those of 8.6 billion tokens.
"""

import _r1_sft


def get_config():
  return _r1_sft.student(
    "llama", "meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", fsdp=32, peak_lr=5e-5
  )
