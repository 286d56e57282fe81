"""The runs of an emulated pod (emulate_pod.py): everything that they read lies in an object store.

The argument is the URL of the folder with teacher, student and corpus, then a comma, the mesh axis
that all devices are on, and another comma and the folder that is written to:
tools/pod_config.py:s3://bucket/run,tensor,s3://bucket/run/out
"""

from distill_jax import config

SEQ_LEN = 256
ROWS_PER_SHARD = 32


def get_config(argument):
  url, axis, out = argument.split(",")
  c = config.base()
  for name in ("data", "fsdp", "context", "tensor"):
    setattr(c.mesh, name, -1 if name == axis else 1)
  c.teacher.source, c.student.source = f"{url}/teacher", f"{url}/student"
  c.data.kind = "jsonl"
  c.data.path = f"{url}/corpus"
  c.data.packed = f"{url}/packed"
  c.data.heldout_fraction = 0.1
  c.data.seq_len = SEQ_LEN
  c.records.n = 15
  c.records.batch_size = 8
  c.records.tokens_per_shard = ROWS_PER_SHARD * SEQ_LEN
  c.records.chunk = 32
  c.losses.soft = config.loss("kd", weight=0.7)
  c.losses.hard = config.loss("ce", weight=0.3)
  c.train.records = (f"{out}/records",)
  c.train.batch_size = 8
  c.train.steps = 60
  c.train.checkpoint_every = 20
  c.train.chunk = c.evaluate.chunk = 32
  c.evaluate.models = {"student": f"run:{out}/student"}
  c.evaluate.sequences = 16
  c.export.dir = f"{out}/export"
  c.export.shard_bytes = 500_000
  return c
