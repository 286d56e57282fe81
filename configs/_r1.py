"""The common part of configs/r1_*.py: students of a teacher that has the same tokenizer."""

from distill_jax import config

TOKENS = 2**33  # tokens in training: about two epochs of DeepSeek's 800,000 samples
TEACHERS = {  # family: repository, shape
  "qwen2": ("hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "qwen2.5-32b"),
  "llama": ("hub:deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3.3-70b"),
}


LONG = 131_072  # tokens; a sequence is spread over 16 devices
YARN = {  # as Qwen's documentation prescribes for more than 32,768 tokens
  "max_position_embeddings": LONG,
  "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
}


def student(family, name, shape, seq_len, batch, fsdp, peak_lr):
  """Returns the config of a student.

  Args:
    family: the model family, e.g. "qwen2".
    name: the Hugging Face repository with its initial weights.
    shape: its named shape.
    seq_len: the sequence length, as a string, because it is the argument after the config's name.
    batch: sequences per step, by seq_len.
    fsdp: number of devices that parameters are sharded over: half of a v5p slice. XLA compiles an
      all-gather over a whole slice to an all-reduce, which sends more bytes (for 7B on 64 chips 86
      GB per step, compared with 57 GB over 2 x 32).
    peak_lr: the peak learning rate.
  """
  if seq_len not in map(str, batch):
    lengths = " or ".join(map(str, batch))
    raise ValueError(f"seq_len is {seq_len}; expected {lengths}. Choose one of them.")
  c = config.base()
  c.teacher.source, c.teacher.shape = TEACHERS[family]
  c.student.source, c.student.shape = f"hub:{name}", shape
  c.teacher.family = c.student.family = family
  c.teacher.dtype = c.teacher.param_dtype = c.student.dtype = "bfloat16"
  c.student.remat = "full"
  c.mesh.data, c.mesh.fsdp = -1, fsdp
  if int(seq_len) == LONG:
    c.mesh.data, c.mesh.fsdp, c.mesh.context = 1, -1, 16
    if family == "qwen2":
      c.student.changes = c.teacher.changes = YARN

  c.data.kind = "jsonl"
  c.data.path = "data/r1.jsonl"
  c.data.seq_len = int(seq_len)
  c.data.heldout_fraction = 0.01

  c.records.kind = "sampled"
  c.records.n = 63
  c.records.batch_size = c.records.heldout_sequences = batch[int(seq_len)]

  c.losses.soft = config.loss("kd", weight=0.9)
  c.losses.hard = config.loss("ce", weight=0.1)
  c.train.records, c.train.heldout = ("records",), ("records/heldout",)
  c.train.batch_size = batch[int(seq_len)]
  c.train.chunk = c.evaluate.chunk = 512
  c.train.steps = TOKENS // (int(seq_len) * batch[int(seq_len)])
  c.optim.peak_lr = peak_lr
  c.optim.warmup_steps = 100
  return c
