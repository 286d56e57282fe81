"""Trains Qwen2.5 32B on the records of DeepSeek-R1 671B, which has another tokenizer.

  distill-jax preflight --config=configs/r1_qwen_32b.py --topology=v5p:4x4x8
  distill-jax retarget  --config=configs/r1_qwen_32b.py --workdir=retargeted/qwen2
  distill-jax train     --config=configs/r1_qwen_32b.py --workdir=runs/r1_qwen_32b

The records to retarget are those of configs/r1_record.py; configs/_r1.py has the cost.

With configs/r1_qwen_32b.py:32768 the sequences have 32,768 tokens. Estimates of preflight
for a step on v5p:4x4x8, with 256 sequences of 4,096 tokens or 128 of 32,768 (one per
device):

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096    19.6 of 95.74      216    4.75    75%     220,541      1,385
    32,768    40.1 of 95.74      216   25.05    73%     167,406      1,824

With configs/r1_qwen_32b.py:131072 each sequence is spread over 16 devices. Estimates for a step on
v5p:4x4x4, with 4 sequences of 131,072 tokens, at a lower compiler effort:

    tokens       GiB/device  s/step   MFU    tokens/s  chip-hours
   131,072    19.8 of 95.74   11.49    70%      45,623      3,347

Times are lower bounds from published peaks, not forecasts. Chip-hours are for 8.6 billion tokens.
"""

import _r1


def get_config(seq_len="4096"):
  return _r1.student(
    "qwen2",
    "Qwen/Qwen2.5-32B",
    "qwen2.5-32b",
    seq_len,
    batch={4_096: 256, 32_768: 128, 131_072: 4},
    fsdp=64,
    peak_lr=6e-5,
  )
