"""What students fine-tuned on R1's text share: the road of DeepSeek-R1-Distill, whole.

R1 answers from a server, what is right and clean is kept, and the student learns to say it:
no distribution is stored, so R1's tokenizer does not matter. Rates, the batch of 64 and the
length of 32,768 tokens are those of the paper (arXiv:2501.12948v2, supplement), as are
temperature 0.6 and top-p 0.95.
"""

from distill_jax import config

TOKENS = 2**33  # seen in training: 800,000 samples of about 5,000 tokens, twice
SEQ_LEN, BATCH = 32_768, 64
EVALUATIONS = tuple(f"data/{name}.jsonl" for name in ("aime2024", "math500", "gpqa_diamond"))


def student(family, name, shape, fsdp, peak_lr):
  """A student's config.

  Args:
    family, name, shape: "qwen2", the repository of its first weights, its named shape.
    fsdp: devices that parameters are spread over.
  """
  c = config.base()
  for model in (c.student, c.teacher):  # `record` takes the teacher's tokenizer and chat template
    model.source, model.shape, model.family = f"hub:{name}", shape, family
    model.dtype, model.remat = "bfloat16", "full"
  c.mesh.data, c.mesh.fsdp = -1, fsdp

  g = c.generate
  g.prompts, g.chat, g.on_bad = "data/problems.jsonl", True, "skip"
  g.samples, g.max_new_tokens = 4, 32_768
  g.temperature, g.top_p = 0.6, 0.95
  g.server.url, g.server.model = "http://localhost:8000/v1", "deepseek-ai/DeepSeek-R1"
  g.server.in_flight = 256

  c.filter.samples, c.filter.on_bad = "runs/r1_sft/generated", "skip"
  c.filters.format = config.filter("format")
  c.filters.right = config.filter("math")
  c.filters.fresh = config.filter("repetition")
  c.filters.new = config.filter("decontaminate", against=EVALUATIONS)
  c.filter.order = ("format", "right", "fresh", "new")

  c.data.kind, c.data.path = "chat", "runs/r1_sft/filtered/kept.jsonl"
  c.data.seq_len, c.data.on_bad = SEQ_LEN, "skip"
  c.data.heldout_fraction = 0.01
  c.records.kind = "text"

  c.losses.hard = config.loss("ce")
  c.train.records = ("records",)
  c.train.batch_size = BATCH
  c.train.chunk = c.evaluate.chunk = 512
  c.train.steps = TOKENS // (SEQ_LEN * BATCH)
  c.optim.peak_lr, c.optim.end_fraction = peak_lr, 0.1
  c.optim.warmup_steps = 100
  c.optim.weight_decay = 0.0
  return c
