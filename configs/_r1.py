"""The common part of configs/r1_*.py: students of DeepSeek-R1 671B, which has another tokenizer.

The records of configs/r1_record.py, in R1's tokens, become records in those of Qwen or Llama:

  distill-jax retarget --config=configs/r1_qwen_7b.py  --workdir=retargeted/qwen2  # for all Qwen
  distill-jax retarget --config=configs/r1_llama_8b.py --workdir=retargeted/llama  # for both Llama

It runs on CPUs, once for each tokenizer, and several machines can share the work (retarget.slice).
At 60,000 of R1's tokens per second and core, 4.3 billion take 20 core-hours: 76 minutes on
16 cores. A store has about as many bytes as the records, 135 GB.

Rows have as many tokens as those of the records, so a step is that of any store with 63 samples per
token. What does not fit is cut: Qwen's tokenizer makes 0.86 to 1.01 times as many tokens as R1's of
a row of prose or code, but 1.1 to 1.2 times as many of one of GSM8K, because it splits numbers into
single digits; Llama's makes 0.84 to 1.004 times as many. retarget.dry_run prints what is cut.
"""

from distill_jax import config

TOKENS = 2**33  # tokens in training: two epochs of the records
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
  c.teacher.source = "hub:deepseek-ai/DeepSeek-R1"
  c.teacher.family, c.teacher.shape = "deepseek_v3", "deepseek-v3"
  c.student.source, c.student.shape = f"hub:{name}", shape
  c.student.family = family
  c.teacher.dtype = c.teacher.param_dtype = c.student.dtype = "bfloat16"
  c.student.remat = "full"
  c.mesh.data, c.mesh.fsdp = -1, fsdp
  if int(seq_len) == LONG:
    c.mesh.data, c.mesh.fsdp, c.mesh.context = 1, -1, 16
    if family == "qwen2":
      c.student.changes = YARN

  c.data.kind = "jsonl"
  c.data.path = "data/r1.jsonl"
  c.data.seq_len = int(seq_len)
  c.data.heldout_fraction = 0.01

  c.records.kind = "sampled"
  c.records.n = 63

  c.retarget.records = "records"
  c.retarget.seq_len = int(seq_len)

  c.losses.soft = config.loss("kd", weight=0.9)
  c.losses.hard = config.loss("ce", weight=0.1)
  store = f"retargeted/{family}"
  c.train.records, c.train.heldout = (store,), (f"{store}/heldout",)
  c.train.batch_size = batch[int(seq_len)]
  c.train.chunk = c.evaluate.chunk = 512
  c.train.steps = TOKENS // (int(seq_len) * batch[int(seq_len)])
  c.optim.peak_lr = peak_lr
  c.optim.warmup_steps = 100
  return c
