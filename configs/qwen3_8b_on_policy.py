"""Trains Qwen3 8B on its own answers, with Qwen3 32B as the teacher."""

from distill_jax import config

PROMPT, ANSWER = 1_024, 4_096  # tokens, at most
BATCH, SAMPLES = 256, 4  # texts per step; texts per prompt


def get_config(scores: str = "live"):
  c = config.base()
  for model, name in ((c.student, "8b"), (c.teacher, "32b")):
    model.family, model.shape = "qwen3", f"qwen3-{name}"
    model.source = f"hub:Qwen/Qwen3-{name.upper()}"
    model.dtype, model.remat = "bfloat16", "full"
  c.teacher.param_dtype = "bfloat16"
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 4

  g = c.generate
  g.prompts, g.chat, g.on_bad = "data/problems.jsonl", True, "skip"
  g.samples, g.max_new_tokens, g.cache_len = SAMPLES, ANSWER, PROMPT + ANSWER
  g.batch_size, g.prefill_rows, g.prefill_chunk = BATCH, 64, 256

  c.train.steps, c.train.batch_size = 150, BATCH
  c.train.chunk = 512
  c.optim.peak_lr, c.optim.end_fraction, c.optim.warmup_steps = 2e-6, 1.0, 5
  c.optim.weight_decay = 0.0
  if scores == "live":
    c.train.online = True
    c.losses.soft = config.loss("kd", divergence="reverse_kl")
  else:
    raise ValueError(f"scores is {scores!r}; expected 'live' or 'stored'. Choose one.")
  return c
