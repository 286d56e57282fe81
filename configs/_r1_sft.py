"""The common part of configs/r1_sft_*.py: the full recipe of DeepSeek-R1-Distill.

R1 generates answers on a server, correct and clean answers are kept, and the student is trained on
their text. Distributions are not stored, so student and teacher can have different tokenizers. The
learning rates, the batch of 64, the length of 32,768 tokens, the temperature of 0.6 and the top-p
of 0.95 are those of the paper (arXiv:2501.12948v2, supplement).
"""

from distill_jax import config

TOKENS = 2**33  # tokens in training: two epochs of 800,000 samples with about 5,000 tokens
SEQ_LEN, BATCH = 32_768, 64
EVALUATIONS = tuple(f"data/{name}.jsonl" for name in ("aime2024", "math500", "gpqa_diamond"))


def student(family, name, shape, fsdp, peak_lr):
  """Returns the config of a student.

  Args:
    family: the model family, e.g. "qwen2".
    name: the Hugging Face repository with its initial weights.
    shape: its named shape.
    fsdp: number of devices that parameters are sharded over.
    peak_lr: the peak learning rate.
  """
  c = config.base()
  for model in (c.student, c.teacher):  # `pack` uses the teacher's tokenizer and chat template
    model.source, model.shape, model.family = f"hub:{name}", shape, family
    model.dtype, model.remat = "bfloat16", "full"
  c.mesh.data, c.mesh.fsdp = -1, fsdp

  g = c.generate
  g.prompts, g.chat, g.on_bad = "data/problems.jsonl", True, "skip"
  g.samples, g.max_new_tokens = 4, 32_768
  g.temperature, g.top_p = 0.6, 0.95
  g.server.urls, g.server.model = ("http://localhost:8000/v1",), "deepseek-ai/DeepSeek-R1"
  g.server.in_flight = 256
  # For the own decoder, without a server, and for `evaluate`: two rows per device of v5p:4x4x4.
  g.batch_size, g.prefill_rows, g.cache_len = 128, 64, SEQ_LEN

  c.filter.samples, c.filter.on_bad = "runs/r1_sft/generated", "skip"
  c.filters.format = config.filter("format")
  c.filters.right = config.filter("math")
  c.filters.fresh = config.filter("repetition")
  c.filters.new = config.filter("decontaminate", against=EVALUATIONS)
  c.filter.order = ("format", "right", "fresh", "new")

  c.data.kind, c.data.path = "chat", "runs/r1_sft/filtered/kept"
  c.data.seq_len, c.data.on_bad = SEQ_LEN, "skip"
  c.data.heldout_fraction = 0.01
  c.records.kind, c.records.heldout_sequences = "text", BATCH

  c.losses.hard = config.loss("ce")
  c.train.records, c.train.heldout = ("records",), ("records/heldout",)
  c.train.batch_size = BATCH
  c.train.chunk = c.evaluate.chunk = 512
  c.train.steps = TOKENS // (SEQ_LEN * BATCH)
  c.optim.peak_lr, c.optim.end_fraction = peak_lr, 0.1
  c.optim.warmup_steps = 100
  c.optim.weight_decay = 0.0
  return c
