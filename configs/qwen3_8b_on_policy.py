"""Trains Qwen3 8B on its own answers, with Qwen3 32B as the teacher.

  C=configs/qwen3_8b_on_policy.py   # or configs/qwen3_8b_on_policy.py:stored
  distill-jax preflight --config=$C --topology=v5p:4x4x4 --verb=on_policy
  distill-jax on_policy --config=$C --workdir=runs/qwen3_8b_on_policy

In each of 150 steps, 256 answers to 64 problems are trained on, cut off at 4,096 tokens. `live` has
the teacher in the step and the exact reverse KL divergence; each step trains on answers of the
current student. `stored` samples the answers of 4 steps at once, stores the teacher's
log-probability of each token, and trains on the policy gradient. The learning rate, the batch, the
steps and the length are those of Lightning OPD (arXiv:2604.13010). A student that is far from its
teacher, such as Qwen3-8B-Base, should be trained on the teacher's texts first.

Estimates of preflight for v5p:4x4x4, with answers of 4,096 tokens, in seconds per step:

               GiB/device   generate   score   train   tokens/s   chip-hours
    live    33.1 of 95.74       10.1     3.1     3.0     64,666           43
    stored  31.7 of 95.74        5.9     3.1     3.0     87,341           32

Times are lower bounds from published peaks, not forecasts. A decoder that reaches a quarter of its
bound takes 40 and 24 seconds, and the runs 124 and 79 chip-hours. Most of the time goes to reading
weights and caches for each token, so stored scores save time because four times as many answers
share the weights that a device reads. With mesh.tensor=1, a device reads all weights, and `live`
takes 27 seconds to generate.
"""

from distill_jax import config

PROMPT, ANSWER = 1_024, 4_096  # tokens, at most
BATCH, SAMPLES = 256, 4  # answers per step, and per problem


def get_config(scores: str = "live"):
  c = config.base()
  for model, size in ((c.student, "8B"), (c.teacher, "32B")):
    model.source = f"hub:Qwen/Qwen3-{size}"
    model.family, model.shape = "qwen3", f"qwen3-{size.lower()}"
    model.dtype, model.remat = "bfloat16", "full"
  c.teacher.param_dtype = "bfloat16"
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 4

  g = c.generate
  g.prompts, g.chat, g.on_bad = "data/problems.jsonl", True, "skip"
  g.samples, g.max_new_tokens, g.cache_len = SAMPLES, ANSWER, PROMPT + ANSWER
  g.prefill_rows, g.prefill_chunk, g.repetition = 64, 256, 64

  if scores == "live":
    c.on_policy.every, c.train.online = 1, True
    c.losses.soft = config.loss("kd", divergence="reverse_kl")
  elif scores == "stored":
    c.on_policy.every, c.records.kind, c.records.batch_size = 4, "labels", 64
    c.losses.soft = config.loss("policy_gradient")
  else:
    raise ValueError(f"scores is {scores!r}; expected 'live' or 'stored'. Choose one.")
  g.batch_size = BATCH * c.on_policy.every
  c.on_policy.max_repetition = 0.1

  c.train.steps, c.train.batch_size, c.train.chunk = 150, BATCH, 512
  c.optim.peak_lr, c.optim.schedule, c.optim.warmup_steps = 2e-6, "constant", 5
  c.optim.weight_decay = 0.0
  return c
