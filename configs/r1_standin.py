"""Trains a student of configs/r1_*.py on records of a smaller teacher that has its tokenizer.

  C=configs/r1_standin.py:qwen_7b
  distill-jax preflight --config=$C --topology=v5p:4x4x4
  distill-jax record    --config=$C --workdir=records
  distill-jax train     --config=$C --workdir=runs/r1_standin_qwen_7b

R1-Distill-Qwen-32B stands in for R1 with the students of Qwen, R1-Distill-Llama-70B with those of
Llama. Nothing is retargeted. With configs/r1_standin.py:qwen_7b:32768 the sequences have 32,768
tokens. A step is that of configs/r1_qwen_7b.py, whose docstring has the estimates.
"""

import importlib

TEACHERS = {  # family: repository, shape
  "qwen2": ("hub:deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "qwen2.5-32b"),
  "llama": ("hub:deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3.3-70b"),
}


def get_config(student="qwen_7b"):
  name, _, seq_len = student.partition(":")
  c = importlib.import_module(f"r1_{name}").get_config(seq_len or "4096")
  c.teacher.family = c.student.family
  c.teacher.source, c.teacher.shape = TEACHERS[c.student.family]
  c.teacher.changes = c.student.changes
  c.records.batch_size = c.records.heldout_sequences = c.train.batch_size
  c.retarget.records, c.retarget.seq_len = "", 0
  c.train.records, c.train.heldout = ("records",), ("records/heldout",)
  return c
