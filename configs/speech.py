"""Distils Whisper tiny.en into a student with half of its decoder (arXiv:2311.00430).

  python tools/spoken_prompts.py DIR runs/speech    # its docstring describes DIR
  distill-jax generate --config=configs/speech.py           --workdir=runs/speech/generated
  distill-jax record   --config=configs/speech.py:records   --workdir=runs/speech/records
  distill-jax train    --config=configs/speech.py:hard      --workdir=runs/speech/hard
  distill-jax train    --config=configs/speech.py:distilled --workdir=runs/speech/distilled
  distill-jax evaluate --config=configs/speech.py           --workdir=runs/speech
  distill-jax export   --config=configs/speech.py:distilled --workdir=runs/speech/distilled

The student has the teacher's encoder, which is frozen, and the first and last of its four decoder
layers. `generate` writes the teacher's transcriptions as pseudo-labels if they differ from the
transcript in at most a tenth of the words (261 of 341). `record` stores the teacher's distributions
on these. Expected results on the 175 held-out prompts, the mean of seeds 0, 1 and 2 (minimum -
maximum):

  |                              | word error rate     | KL to the teacher     | parameters |
  |------------------------------|---------------------|-----------------------|------------|
  | teacher, tiny.en             | 9.2%                | 0                     | 37.5 M     |
  | its layers, before training  | 232%                | 4.658                 | 32.7 M     |
  | hard, 341 transcripts        | 20.8% (18.6 - 23.5) | 1.129 (1.083 - 1.206) | 32.7 M     |
  | distilled, 261 pseudo-labels | 22.1% (19.8 - 26.6) | 0.832 (0.751 - 0.905) | 32.7 M     |

With every seed, the distilled student is closer to the teacher. The difference in word error rate
is within the spread of the seeds, although the distilled student is not trained on transcripts,
which only select the pseudo-labels. The data are 516 short prompts by one speaker, seen once or
twice. They show that the recipe works, but not how well it works on other speech. Cost on one core:
6 to 8 minutes per student.
"""

import os

from distill_jax import config

AT = os.environ.get("SPEECH", "runs/speech")  # the folder of all data and runs


def get_config(student: str = "teacher"):
  c = config.base()
  c.tasks.prompts = config.task(
    "speech",
    path=f"{AT}/train.jsonl",
    heldout=f"{AT}/heldout.jsonl",
    frames=1500,
    max_tokens=32,
    on_bad="skip",
  )
  c.teacher.source = c.student.source = f"{AT}/tiny.en"
  c.student.keep_layers = (0, 3)
  c.student.train, c.student.frozen = "frozen", ("model.encoder.",)
  c.records.n, c.records.batch_size = 63, 8
  c.train.batch_size = c.evaluate.batch_size = 8
  c.train.steps = 60
  c.train.keep, c.train.chunk, c.evaluate.chunk = 1, 32, 32
  c.optim.peak_lr, c.optim.warmup_steps, c.optim.weight_decay = 3e-4, 5, 0.01
  if student in ("records", "distilled"):
    c.tasks.prompts.path = f"{AT}/generated/pairs.jsonl"
  if student == "distilled":
    c.train.records = (f"{AT}/records",)
    c.losses.soft = config.loss("kd", weight=0.8)
    c.losses.hard = config.loss("ce", weight=1.0)  # on the teacher's transcriptions
  elif student == "hard":
    c.losses.hard = config.loss("ce")  # on the transcripts
  elif student not in ("teacher", "records"):
    roles = "teacher, records, hard or distilled"
    raise ValueError(f"The student is {student!r}; expected {roles}. Choose one of them.")
  c.evaluate.models = {n: f"run:{AT}/{n}" for n in ("hard", "distilled")}
  c.export.dir, c.export.dtype = f"{AT}/export", "float32"
  return c
