"""What the R1-Distill students share: sampled records of a teacher with their own tokenizer."""

from distill_jax import config

TOKENS = 2**33  # seen in training: DeepSeek's 800,000 samples, about twice
TEACHERS = {  # family: repository, shape
  "qwen2": ("hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "qwen2.5-32b"),
  "llama": ("hub:deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3.3-70b"),
}


def student(family, name, shape, seq_len, batch, fsdp, peak_lr):
  """A student's config.

  Args:
    family, name, shape: "qwen2", the repository of its first weights, its named shape.
    seq_len: as text, since it stands behind the config's name.
    batch: sequences a step, by seq_len.
    fsdp: devices that parameters are spread over, half a v5p slice: where a gather spans a
      whole one, XLA makes an all-reduce of it, which sends twice the bytes (for 7B on 64
      chips 86 GB a step, 57 over 2 x 32).
  """
  if seq_len not in map(str, batch):
    raise ValueError(f"seq_len is {seq_len}; this config has {' and '.join(map(str, batch))}")
  c = config.base()
  c.teacher.source, c.teacher.shape = TEACHERS[family]
  c.student.source, c.student.shape = f"hub:{name}", shape
  c.teacher.family = c.student.family = family
  c.teacher.dtype = c.teacher.param_dtype = c.student.dtype = "bfloat16"
  c.student.remat = "full"
  c.mesh.data, c.mesh.fsdp = -1, fsdp

  c.data.kind = "jsonl"
  c.data.path = "data/r1.jsonl"
  c.data.seq_len = int(seq_len)

  c.records.kind = "sampled"
  c.records.n = 63
  c.records.batch_size = batch[int(seq_len)]

  c.losses.soft = config.loss("kd", weight=0.9)
  c.losses.hard = config.loss("ce", weight=0.1)
  c.train.records = ("records",)
  c.train.batch_size = batch[int(seq_len)]
  c.train.chunk = c.evaluate.chunk = 512
  c.train.steps = TOKENS // (int(seq_len) * batch[int(seq_len)])
  c.optim.peak_lr = peak_lr
  c.optim.warmup_steps = 100
  return c
