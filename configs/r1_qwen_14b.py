"""Trains Qwen2.5 14B on the records of DeepSeek-R1 671B, which has another tokenizer.

  distill-jax preflight --config=configs/r1_qwen_14b.py --topology=v5p:4x4x4
  distill-jax retarget  --config=configs/r1_qwen_14b.py --workdir=retargeted/qwen2
  distill-jax train     --config=configs/r1_qwen_14b.py --workdir=runs/r1_qwen_14b

The records to retarget are those of configs/r1_record.py; configs/_r1.py has the cost.

With configs/r1_qwen_14b.py:32768 the sequences have 32,768 tokens. Estimates of preflight
for a step on v5p:4x4x4, with 256 sequences of 4,096 tokens or 64 of 32,768 (one per
device):

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096    23.2 of 95.74       87    4.26    75%     245,969        621
    32,768    31.4 of 95.74       87   13.05    72%     160,658        951

Times are lower bounds from published peaks, not forecasts. Chip-hours are for 8.6 billion tokens.
"""

import _r1


def get_config(seq_len="4096"):
  return _r1.student(
    "qwen2",
    "Qwen/Qwen2.5-14B",
    "qwen2.5-14b",
    seq_len,
    batch={4_096: 256, 32_768: 64},
    fsdp=32,
    peak_lr=6e-5,
  )
