"""Distils a MiniLM for the sentiment of film reviews into a student with two of its layers.

  python tools/sentiment.py DIR runs/sentiment    # its docstring describes DIR
  distill-jax train    --config=configs/sentiment.py:teacher   --workdir=runs/sentiment/teacher
  distill-jax record   --config=configs/sentiment.py           --workdir=runs/sentiment/records

then for seeds 0, 1 and 2 (--config.seed=0 …):

  distill-jax train    --config=configs/sentiment.py:hard      --workdir=runs/sentiment/hard_0
  distill-jax train    --config=configs/sentiment.py:distilled --workdir=runs/sentiment/distilled_0
  distill-jax evaluate --config=configs/sentiment.py           --workdir=runs/sentiment
  distill-jax export   --config=configs/sentiment.py:distilled --workdir=runs/sentiment/distilled_0

With few labels, the teacher and one student are trained on a tenth of the texts, and the other
student on the teacher's outputs for all texts. The commands are the same with the roles
few_teacher, few_hard and few_distilled, e.g.

  C=configs/sentiment.py R=runs/sentiment
  distill-jax train  --config=$C:few_teacher   --workdir=$R/few_teacher
  distill-jax record --config=$C:few_distilled --workdir=$R/few_records

Expected results on 1,032 held-out snippets, the mean of three seeds (minimum - maximum):

  |                   | accuracy            | ce    | KL to the teacher | same answer | parameters |
  |-------------------|---------------------|-------|-------------------|-------------|------------|
  | teacher, 6 layers | 83.5%               | 0.375 | 0                 | 100%        | 22.7 M     |
  | 2 layers, hard    | 79.2% (78.9 - 79.7) | 0.447 | 0.088             | 84.9%       | 15.6 M     |
  | 2 layers, soft    | 79.6% (78.3 - 80.2) | 0.448 | 0.072             | 86.7%       | 15.6 M     |

With every seed, the student is closer to the teacher with soft labels. The difference in accuracy
is within the spread of the seeds. 160 steps of 32 snippets are half an epoch. With few labels:

  |                               | accuracy            | ce    | KL to its teacher | same answer |
  |-------------------------------|---------------------|-------|-------------------|-------------|
  | few_teacher, 955 labels       | 78.8%               | 0.672 | 0                 | 100%        |
  | few_hard, 955 labels          | 74.6% (74.2 - 75.0) | 0.654 | 0.333             | 80.8%       |
  | few_distilled, 9,536 texts    | 78.9% (78.6 - 79.4) | 0.594 | 0.183             | 87.8%       |

The number of steps of few_hard is the best of 60, 120 and 300, by accuracy on a tenth of the
training texts that was held out for it. Cost on 2 busy CPU cores: 9 minutes for the teacher, 2 to 4
for a student; with few labels, 3 for the teacher and 7 for a student on one core.
"""

import os

from distill_jax import config

AT = os.environ.get("SENTIMENT", "runs/sentiment")  # the folder of all data and runs
STEPS = {"few_teacher": 150, "few_hard": 120, "few_distilled": 800}


def get_config(role: str = "distilled"):
  kind = role.removeprefix("few_")  # teacher, hard or distilled
  few = role[: -len(kind)]  # "few_" or ""
  c = config.base()
  c.tasks.liked = config.task(
    "text_classes",
    path=f"{AT}/few.jsonl" if few and kind != "distilled" else f"{AT}/snippets.jsonl",
    classes=("negative", "positive"),
    max_tokens=32,
    tokenizer=f"{AT}/minilm/tokenizer.json",
  )
  c.teacher.source = f"run:{AT}/{few}teacher"
  c.student.source = f"{AT}/minilm"
  c.student.changes, c.student.new = {"num_labels": 2}, ("classifier",)
  c.records.kind = "dense"  # two log-probabilities per text
  c.records.batch_size = c.train.batch_size = c.evaluate.batch_size = 32
  c.records.heldout_sequences = 64
  c.train.steps = STEPS.get(role, 160)
  c.train.keep = 1
  c.optim.warmup_steps, c.optim.weight_decay = 16, 0.01

  if kind == "teacher":
    c.losses.hard = config.loss("ce")
    c.optim.peak_lr = 1e-4
  elif kind in ("hard", "distilled"):
    c.student.keep_layers = (0, 5)
    c.optim.peak_lr = 2e-4
    if kind == "hard":
      c.losses.hard = config.loss("ce")
    else:
      records = f"{AT}/{few}records"
      c.train.records, c.train.heldout = (records,), (f"{records}/heldout",)
      c.losses.soft = config.loss("kd", temperature=2.0)
  else:
    roles = "teacher, hard or distilled, or one of them after 'few_'"
    raise ValueError(f"The role is {role!r}; expected {roles}. Choose one of them.")

  runs = [f"{few}{name}_{seed}" for name in ("hard", "distilled") for seed in range(3)]
  c.evaluate.models = {name: f"run:{AT}/{name}" for name in runs}
  c.export.dir, c.export.dtype = f"{AT}/export", "float32"
  return c
