"""DeepSeek-R1 671B reads a corpus once, and what it says is stored, 63 points a token.

  distill-jax preflight --config=configs/r1_record.py --topology=v5p:4x4x4 --verb=record
  distill-jax record    --config=configs/r1_record.py --workdir=records

and with configs/r1_record.py:32768 on longer sequences. 4.3 billion tokens; weights in bfloat16,
experts, heads and vocabulary over 4 chips, all of it over 16 such groups. What preflight says
of a batch on v5p:4x4x4, 64 sequences of 4,096 tokens or 16 of 32,768:

    tokens     GiB a device   GB sent  s/step   MFU    tokens/s  chip-hours
     4,096    24.6 of 95.74      359    0.75   100%     351,868        217
    32,768    27.8 of 95.74      403    2.77   100%     189,370        403

Times are bounds at published peaks, not forecasts. Gathering the weights takes 0.6 seconds a
batch on the links' own, so a batch is no smaller than this. The store: about 135 GB, 31.5 bytes a
token. R1 has a tokenizer of its own: students of another one learn from its text alone.
"""

from distill_jax import config


def get_config(seq_len="4096"):
  c = config.base()
  c.teacher.source = "hub:deepseek-ai/DeepSeek-R1"
  c.teacher.family, c.teacher.shape = "deepseek_v3", "deepseek-v3"
  c.teacher.dtype = c.teacher.param_dtype = "bfloat16"
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 4

  c.data.kind = "jsonl"
  c.data.path = "data/r1.jsonl"
  c.data.seq_len = int(seq_len)
  c.data.sequences = 2**32 // int(seq_len)

  c.records.kind = "sampled"
  c.records.n = 63
  c.records.batch_size = {4_096: 64, 32_768: 16}[int(seq_len)]
  return c
