"""DOC"""

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
