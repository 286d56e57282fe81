"""Records the outputs of DeepSeek-R1 671B on a corpus, with 63 samples per token.

  distill-jax preflight --config=configs/r1_record.py --topology=v5p:4x4x4 --verb=record
  distill-jax pack      --config=configs/r1_record.py --workdir=packed    # on CPUs
  distill-jax record    --config=configs/r1_record.py --workdir=records --config.data.packed=packed

With configs/r1_record.py:32768 the sequences have 32,768 tokens. The corpus has 4.3 billion tokens.
Weights are in bfloat16. Experts, heads and vocabulary are split over 4 chips, and parameters over
16 groups of 4 chips. Estimates of preflight for a batch on v5p:4x4x4, 64 sequences of 4,096 tokens
or 16 of 32,768:

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096    24.6 of 95.74      359    0.75   100%     351,868        217
    32,768    27.8 of 95.74      403    2.77   100%     189,370        403

With configs/r1_record.py:131072 each sequence is spread over 8 groups of 4 chips. Estimates for a
batch on v5p:4x4x4, 2 sequences of 131,072 tokens, at a lower compiler effort:

    tokens       GiB/device   GB sent  s/step   MFU    tokens/s  chip-hours
   131,072    24.9 of 95.74      368    3.58   100%      73,304      1,042

Each chip computes the keys and values of its heads from the latents of all positions. That takes 4%
more operations than are counted here.

Times are lower bounds from published peaks, not forecasts. Gathering the weights takes at least 0.6
seconds per batch, so smaller batches would be slower per token. The store takes about 135 GB, 31.5
bytes per token. Shards of 262,144 tokens (8 MB) cost a SIGTERM at most a minute: at 94,000 tokens/s
16 hosts finish one each every 45 seconds.

Students with R1's tokenizer are trained on the store itself; those of configs/r1_*.py, which have
other tokenizers, on what `retarget` makes of it.
"""

from distill_jax import config


def get_config(seq_len="4096"):
  c = config.base()
  c.teacher.source = "hub:deepseek-ai/DeepSeek-R1"
  c.teacher.family, c.teacher.shape = "deepseek_v3", "deepseek-v3"
  c.teacher.dtype = c.teacher.param_dtype = "bfloat16"
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 4
  if int(seq_len) == 131_072:
    c.mesh.context = 8  # sequences are spread over 8 groups of 4 devices

  c.data.kind = "jsonl"
  c.data.path = "data/r1.jsonl"
  c.data.seq_len = int(seq_len)
  c.data.sequences = 2**32 // int(seq_len)
  c.data.heldout_fraction = 0.01

  c.records.kind = "sampled"
  c.records.n = 63
  c.records.batch_size = {4_096: 64, 32_768: 16, 131_072: 2}[int(seq_len)]
  c.records.heldout_sequences = 2**20 // int(seq_len)
  c.records.tokens_per_shard = 2**18
  return c
