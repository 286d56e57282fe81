"""Qwen2.5 7B learns from sampled records of R1-Distill-Qwen-32B.

  distill-jax preflight --config=configs/r1_qwen_7b.py --topology=v5p:4x4x4
  distill-jax record    --config=configs/r1_qwen_7b.py --workdir=records
  distill-jax train     --config=configs/r1_qwen_7b.py --workdir=runs/r1_qwen_7b

and with configs/r1_qwen_7b.py:32768 on longer sequences. What preflight says of a step on
v5p:4x4x4, for 256 sequences of 4,096 tokens and 64 of 32,768 (one a device):

    tokens     GiB a device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096    14.0 of 95.74       57    2.11    76%     496,446        308
    32,768    18.3 of 95.74       57    6.07    73%     345,323        442

Times are bounds at published peaks, not forecasts; chip-hours are those of 8.6 billion tokens.
"""

import _r1


def get_config(seq_len="4096"):
  return _r1.student(
    "qwen2",
    "Qwen/Qwen2.5-7B",
    "qwen2.5-7b",
    seq_len,
    batch={4_096: 256, 32_768: 64},
    fsdp=32,
    peak_lr=8e-5,
  )
