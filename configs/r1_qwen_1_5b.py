"""Trains Qwen2.5 1.5B on the records of DeepSeek-R1 671B, which has another tokenizer.

  distill-jax preflight --config=configs/r1_qwen_1_5b.py --topology=v5e:4x8
  distill-jax retarget  --config=configs/r1_qwen_1_5b.py --workdir=retargeted/qwen2
  distill-jax train     --config=configs/r1_qwen_1_5b.py --workdir=runs/r1_qwen_1_5b

The records to retarget are those of configs/r1_record.py; configs/_r1.py has the cost.

With configs/r1_qwen_1_5b.py:32768 the sequences have 32,768 tokens. Estimates of preflight
for a step on v5e:4x8, with 128 sequences of 4,096 tokens or 32 of 32,768 (one per
device):

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096     6.9 of 15.75        9    1.12    77%     468,085        163
    32,768     7.0 of 15.75        9    4.09    72%     256,617        298

Times are lower bounds from published peaks, not forecasts. Chip-hours are for 8.6 billion tokens.
"""

import _r1


def get_config(seq_len="4096"):
  return _r1.student(
    "qwen2",
    "Qwen/Qwen2.5-1.5B",
    "qwen2.5-1.5b",
    seq_len,
    batch={4_096: 128, 32_768: 32},
    fsdp=32,
    peak_lr=1e-4,
  )
