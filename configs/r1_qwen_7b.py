"""Trains Qwen2.5 7B on the records of DeepSeek-R1 671B, which has another tokenizer.

  distill-jax preflight --config=configs/r1_qwen_7b.py --topology=v5p:4x4x4
  distill-jax retarget  --config=configs/r1_qwen_7b.py --workdir=retargeted/qwen2
  distill-jax train     --config=configs/r1_qwen_7b.py --workdir=runs/r1_qwen_7b

The records to retarget are those of configs/r1_record.py; configs/_r1.py has the cost.

With configs/r1_qwen_7b.py:32768 the sequences have 32,768 tokens. Estimates of preflight
for a step on v5p:4x4x4, with 256 sequences of 4,096 tokens or 64 of 32,768 (one per
device):

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096    14.0 of 95.74       45    2.11    76%     496,446        308
    32,768    17.9 of 95.74       45    6.07    73%     345,323        442

With configs/r1_qwen_7b.py:131072 each sequence is spread over 16 devices. Estimates for a step on
v5p:4x4x4, with 4 sequences of 131,072 tokens, at a compiler effort that is lower, so that the bytes
sent can differ:

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
   131,072     7.8 of 95.74       140    3.10    70%     168,970        904

Times are lower bounds from published peaks, not forecasts. Chip-hours are for 8.6 billion tokens.
"""

import _r1


def get_config(seq_len="4096"):
  return _r1.student(
    "qwen2",
    "Qwen/Qwen2.5-7B",
    "qwen2.5-7b",
    seq_len,
    batch={4_096: 256, 32_768: 64, 131_072: 4},
    fsdp=32,
    peak_lr=8e-5,
  )
