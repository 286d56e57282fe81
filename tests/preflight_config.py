"""The tiny config that preflight's tests start from."""

from pathlib import Path

from distill_jax import config

CONFIGS = Path(__file__).parents[1] / "configs"


def model_config():
  c = config.base()
  c.teacher.shape = c.student.shape = "tiny"
  c.data.seq_len = 32
  c.data.sequences = 20
  c.records.n = 15
  c.records.batch_size = c.train.batch_size = 4
  c.train.steps = 10
  c.train.chunk = 16
  c.losses.soft = config.loss("kd")
  return c
