"""Trains Llama 3.3 70B on the records of DeepSeek-R1 671B, which has another tokenizer.

  distill-jax preflight --config=configs/r1_llama_70b.py --topology=v5p:4x4x8
  distill-jax retarget  --config=configs/r1_llama_70b.py --workdir=retargeted/llama
  distill-jax train     --config=configs/r1_llama_70b.py --workdir=runs/r1_llama_70b

The records to retarget are those of configs/r1_record.py; configs/_r1.py has the cost.

With configs/r1_llama_70b.py:32768 the sequences have 32,768 tokens. Estimates of preflight
for a step on v5p:4x4x8, with 256 sequences of 4,096 tokens or 128 of 32,768 (one per
device):

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096    36.5 of 95.74      415   10.32    75%     101,633      3,005
    32,768    73.3 of 95.74      415   53.34    73%      78,630      3,884

With configs/r1_llama_70b.py:131072 each sequence is spread over 16 devices. Estimates for a step on
v5p:4x4x4, with 4 sequences of 131,072 tokens, at a lower compiler effort:

    tokens       GiB/device  s/step   MFU    tokens/s  chip-hours
   131,072    36.5 of 95.74   23.68    70%      22,137      6,898

Times are lower bounds from published peaks, not forecasts. Chip-hours are for 8.6 billion tokens.
"""

import _r1


def get_config(seq_len="4096"):
  return _r1.student(
    "llama",
    "meta-llama/Llama-3.3-70B-Instruct",
    "llama-3.3-70b",
    seq_len,
    batch={4_096: 256, 32_768: 128, 131_072: 4},
    fsdp=64,
    peak_lr=2e-5,
  )
