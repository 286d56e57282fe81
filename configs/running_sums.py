"""Compares four ways of distilling, from two models without weights to tables, in an hour.

A prompt is "17+12+8+5+20=", and its answer the running totals "29 37 42 62"
(tools/running_sums.py). A model that generates a wrong total continues from it, on a text that no
correct answer has: what on-policy distillation is for. The models are small enough for two cores
and three seeds, and no weights are needed. Everything runs by

  python tools/on_policy_evidence.py runs/evidence

or by hand:

  python tools/running_sums.py runs/running_sums
  C=configs/running_sums.py; R=runs/running_sums

  distill-jax record    --config=$C             --workdir=$R/corpus     # 60,000 correct answers
  distill-jax train     --config=$C             --workdir=$R/teacher    # 3 layers of width 128
  distill-jax generate  --config=$C:start       --workdir=$R/generated  # answers to 8,000 prompts
  distill-jax filter    --config=$C:start       --workdir=$R/filtered   # keeps correct answers
  distill-jax record    --config=$C:start       --workdir=$R/records
  distill-jax train     --config=$C:start       --workdir=$R/start      # 2 layers of width 64
  distill-jax train     --config=$C:supervised  --workdir=$R/supervised
  distill-jax on_policy --config=$C:live        --workdir=$R/live
  distill-jax evaluate  --config=$C:start       --workdir=$R/live/evaluation \\
    --config.teacher.source=run:$R/live

All ways begin with the same student (`start`), which was trained for a short time on the teacher's
kept answers and its distributions on them. The argument of the config is the way:

  supervised  `train` on the kept answers
  off_policy  `train` on the teacher's distributions on them, with the forward KL divergence
  rounds      `on_policy`: the teacher scores 2,560 of the student's texts every 20 steps, with the
              same kind of records and the same loss as off_policy
  live        `on_policy`: the teacher is in the step, with the exact reverse KL divergence on texts
              of the current student
  log_ratio   like rounds, but the teacher gives only its log-probability of each token

All ways have the same prompts, teacher, steps, schedule of the learning rate, and 128 texts per
step, with about as many tokens: the length of the student's texts is up to the student. Kept
answers and the student's texts are sampled at temperature 1.
"""

from distill_jax import config

RUN = RUNS = "runs/running_sums"
# (width, width of the feed-forward, layers)
TEACHER, STUDENT = (128, 384, 3), (64, 192, 2)
# What tools/on_policy_evidence.py reads.
PROBLEMS = ("running_sums.py", RUN)
PREPARE = (
  ("record", "teacher", f"{RUN}/corpus"),
  ("train", "teacher", f"{RUN}/teacher"),
  ("generate", "start", f"{RUN}/generated"),
  ("filter", "start", f"{RUN}/filtered"),
  ("record", "start", f"{RUN}/records"),
  ("train", "start", f"{RUN}/start"),
)
TEACHER_RUN, START_RUN = f"{RUN}/teacher", f"{RUN}/start"
RATES = dict.fromkeys(("supervised", "off_policy", "rounds", "live", "log_ratio"), 8e-4)
ON_POLICY = ("rounds", "live", "log_ratio")
TARGETS = ("teacher", "start", *RATES)


def set_shape(model, width, mlp, layers, heads=4):
  """Sets the shape of a model with random weights."""
  model.family, model.shape = "llama", "tiny"
  model.changes = {
    "vocab_size": 16,
    "hidden_size": width,
    "intermediate_size": mlp,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": heads,
    "head_dim": width // heads,
  }


def get_config(target: str = "teacher"):
  if target not in TARGETS:
    raise ValueError(
      f"The target is {target!r}; expected {', '.join(TARGETS)}. Choose one of them."
    )
  c = config.base()
  c.data.kind, c.data.tokenizer = "chat", f"{RUN}/tokenizer"
  c.data.seq_len, c.data.heldout_fraction = 32, 0.0
  c.records.heldout_sequences, c.train.heldout = 0, ()
  c.train.batch_size, c.train.checkpoint_every, c.train.checkpoint_minutes = 128, 0, 0.0
  c.optim.warmup_steps, c.optim.end_fraction = 20, 0.1

  if target == "teacher":
    set_shape(c.teacher, *TEACHER)  # its tokens are recorded, without computing anything
    set_shape(c.student, *TEACHER)
    c.data.path, c.records.kind = f"{RUN}/corpus.jsonl", "text"
    c.train.records = (f"{RUN}/corpus",)
    c.losses.hard = config.loss("ce")
    c.train.steps, c.optim.peak_lr = 800, 3e-3
    return c
  c.teacher.source = f"run:{RUN}/teacher"
  g = c.generate
  g.prompts, g.chat, g.cache_len, g.max_new_tokens = f"{RUN}/practice.jsonl", True, 32, 16
  g.batch_size, g.prefill_rows, g.prefill_chunk, g.steps = 128, 128, 16, 4
  c.filter.samples = f"{RUN}/generated"
  c.filters.ended = config.filter("length")
  c.filters.right = config.filter("math")
  c.filter.order = ("ended", "right")
  c.data.path = f"{RUN}/filtered/kept"
  c.records.n, c.records.batch_size, c.train.records = 63, 128, (f"{RUN}/records",)
  c.losses = {"soft": config.loss("kd")}
  if target == "start":
    set_shape(c.student, *STUDENT)
    c.train.steps, c.optim.peak_lr = 600, 2e-3
  else:
    c.student.source = f"run:{RUN}/start"
    c.train.steps, c.optim.peak_lr = 300, RATES[target]
  if target == "supervised":
    c.losses = {"hard": config.loss("ce")}
  if target in ON_POLICY:
    c.train.records, c.on_policy.every = (), 20
  if target == "live":
    c.train.online, c.on_policy.every = True, 1
    c.losses.soft.divergence = "reverse_kl"
  elif target == "log_ratio":
    c.records.kind, c.losses = "labels", {"soft": config.loss("log_ratio")}

  c.evaluate.models, c.evaluate.on, c.evaluate.heldout = {}, ("teacher",), False
  c.evaluate.samples, c.evaluate.max_new_tokens = 4, 16
  c.evaluate.temperature, c.evaluate.top_p = 1.0, 1.0
  c.evals.problems = config.benchmark("jsonl", path=f"{RUN}/heldout.jsonl", question_field="prompt")
  return c
