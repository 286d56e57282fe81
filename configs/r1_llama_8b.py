"""Trains Llama 3.1 8B on the records of DeepSeek-R1 671B, which has another tokenizer.

  distill-jax preflight --config=configs/r1_llama_8b.py --topology=v5p:4x4x4
  distill-jax retarget  --config=configs/r1_llama_8b.py --workdir=retargeted/llama
  distill-jax train     --config=configs/r1_llama_8b.py --workdir=runs/r1_llama_8b

The records to retarget are those of configs/r1_record.py; configs/_r1.py has the cost.

With configs/r1_llama_8b.py:32768 the sequences have 32,768 tokens. Estimates of preflight
for a step on v5p:4x4x4, with 256 sequences of 4,096 tokens or 64 of 32,768 (one per
device):

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096    13.5 of 95.74       45    2.28    76%     460,297        332
    32,768    19.4 of 95.74       45    6.97    73%     300,853        508

Times are lower bounds from published peaks, not forecasts. Chip-hours are for 8.6 billion tokens.
"""

import _r1


def get_config(seq_len="4096"):
  return _r1.student(
    "llama",
    "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b",
    seq_len,
    batch={4_096: 256, 32_768: 64},
    fsdp=32,
    peak_lr=5e-5,
  )
