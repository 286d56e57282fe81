"""Distils the teacher of configs/grade_school.py into 20 of its layers in four ways.

  python tools/grade_school.py runs/grade_school
  C=configs/grade_school_on_policy.py; B=runs/grade_school; R=runs/on_policy

  distill-jax generate  --config=$C          --workdir=$B/generated  # as in grade_school.py
  distill-jax filter    --config=$C          --workdir=$B/filtered
  distill-jax record    --config=$C          --workdir=$B/records
  distill-jax train     --config=$C          --workdir=$B/same       # the teacher, 30 layers
  distill-jax generate  --config=$C:start    --workdir=$R/generated  # 2 answers to 640 problems
  distill-jax filter    --config=$C:start    --workdir=$R/filtered   # keeps correct answers
  distill-jax record    --config=$C:start    --workdir=$R/records
  distill-jax train     --config=$C:start    --workdir=$R/start      # the student
  distill-jax on_policy --config=$C:live     --workdir=$R/live
  distill-jax evaluate  --config=$C:start    --workdir=$R/live/evaluation \\
    --config.teacher.source=run:$R/live

All ways begin with the same student (`start`), which was trained on the teacher's kept answers and
its distributions on them. The argument of the config is the way:

  supervised  `train` on the kept answers
  off_policy  `train` on the teacher's distributions on them, with the forward KL divergence
  rounds      `on_policy`: the teacher scores 32 of the student's texts every 4 steps, with the
              same kind of records and the same loss as off_policy
  live        `on_policy`: the teacher is in the step, with the exact reverse KL divergence on texts
              of the current student
  log_ratio   like rounds, but the teacher gives only its log-probability of each token

All ways have the same start, teacher, steps and schedule of the learning rate, and about the same
number of trained tokens: a step has 2 rows of 512 tokens with about 9 kept answers, or 8 of the
student's texts, whose length is up to the student. They differ in the padding (each of the
student's texts has a row), the work of the teacher, the time, and the texts. Kept answers were
sampled at temperature 0.6 and are correct, so problems that the teacher does not solve are missing.
The student's texts are sampled at temperature 1, and all of them are used.

  python tools/on_policy_evidence.py runs/evidence --config=configs/grade_school_on_policy.py

trains all of them with several learning rates and three seeds, and measures them. This has not been
run to its end: by the time of its first stages, it needs about five hours on two cores.
"""

import grade_school

from distill_jax import config

BASE, RUNS = grade_school.RUN, "runs/on_policy"
# What tools/on_policy_evidence.py reads.
PROBLEMS = ("grade_school.py", BASE)
PREPARE = (
  ("generate", "teacher", f"{BASE}/generated"),
  ("filter", "teacher", f"{BASE}/filtered"),
  ("record", "teacher", f"{BASE}/records"),
  ("train", "teacher", f"{BASE}/same"),
  ("generate", "start", f"{RUNS}/generated"),
  ("filter", "start", f"{RUNS}/filtered"),
  ("record", "start", f"{RUNS}/records"),
  ("train", "start", f"{RUNS}/start"),
)
TEACHER_RUN, START_RUN = f"{BASE}/same", f"{RUNS}/start"
RATES = {
  "supervised": 1e-4,
  "off_policy": 2e-4,
  "rounds": 2e-4,
  "live": 2e-4,
  "log_ratio": 1e-4,
}
ON_POLICY = ("rounds", "live", "log_ratio")
TARGETS = ("teacher", "start", *RATES)


def get_config(target: str = "teacher"):
  if target not in TARGETS:
    raise ValueError(
      f"The target is {target!r}; expected {', '.join(TARGETS)}. Choose one of them."
    )
  c = grade_school.get_config("same")
  if target == "teacher":
    return c
  c.teacher.source = f"run:{BASE}/same"

  c.generate.prompts, c.generate.samples = f"{BASE}/practice.jsonl", 2
  c.generate.batch_size, c.generate.cache_len = 64, 192
  c.filter.samples = f"{RUNS}/generated"
  c.filters.unseen.against = (f"{BASE}/validation.jsonl", f"{BASE}/heldout.jsonl")
  c.data.path, c.data.heldout_fraction = f"{RUNS}/filtered/kept", 0.0
  c.records.heldout_sequences = 0
  c.train.records, c.train.heldout = (f"{RUNS}/records",), ()

  c.train.steps, c.train.checkpoint_every, c.train.checkpoint_minutes = 40, 0, 4.0
  c.losses = {"soft": config.loss("kd")}
  if target == "start":
    c.student.keep_layers = (*range(8), *range(18, 30))
    c.losses.soft.weight, c.losses.hard = 0.9, config.loss("ce", weight=0.1)
    c.optim.peak_lr = 5e-4
  else:
    c.student.source = f"run:{RUNS}/start"
    c.train.steps, c.optim.peak_lr = 16, RATES[target]
    c.train.batch_size = 8 if target in ON_POLICY else 2
  if target == "supervised":
    c.losses = {"hard": config.loss("ce")}
  if target in ON_POLICY:
    c.generate.samples, c.generate.temperature, c.generate.top_p = 1, 1.0, 1.0
    c.generate.batch_size = 32
    c.train.records, c.train.chunk, c.records.batch_size = (), 96, 8
    c.on_policy.every = 4
  if target == "live":
    c.train.online, c.on_policy.every, c.generate.batch_size = True, 1, 8
    c.losses.soft.divergence = "reverse_kl"
  elif target == "log_ratio":
    c.records.kind, c.losses = "labels", {"soft": config.loss("log_ratio")}

  c.evaluate.models, c.evaluate.on = {}, ("teacher",)
  return c
