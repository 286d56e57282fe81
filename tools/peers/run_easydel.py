"""Runs EasyDeL's DistillationTrainer; see tools/bench/peers.py.

  python run_easydel.py small32k

It computes the logits of both models for the whole batch, which is its default; it also has a loss
in chunks (`logits_chunk_size`), which is not measured. Its loss is half the KL divergence and half
the cross-entropy. Its step does not shift labels, so they are shifted here. Its attention computes
in bfloat16 by default; here in float32, as the rest.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile

import easydel
import jax.numpy as jnp
import numpy as np
from datasets import Dataset
from flax import nnx
from peer_shapes import LEARNING_RATE, SHAPES, TEMPERATURE, StepClock, qwen3_config

SHAPE = sys.argv[1]
c = SHAPES[SHAPE]
V, B, T = c["vocab"], c["batch"], c["seq"]


def model_of(name: str, seed: int) -> easydel.Qwen3ForCausalLM:
  config = easydel.Qwen3Config(**qwen3_config(SHAPE, name), attn_dtype=jnp.float32)
  return easydel.Qwen3ForCausalLM(
    config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(seed)
  )


def texts() -> Dataset:
  tokens = np.random.default_rng(0).integers(1, V, (B * c["steps"], T), dtype=np.int32)
  labels = np.roll(tokens, -1, 1)
  labels[:, -1] = -100
  columns = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
  return Dataset.from_dict(columns).with_format("numpy")


class Timed(easydel.DistillationTrainer):
  """A trainer with a clock."""

  def on_step_start(self, state, step):
    if step == 0:
      self.clock = StepClock(c["warmup"])
    return state

  def on_step_end(self, state, metrics, step):
    assert np.isfinite(float(metrics.loss))
    self.clock.tick()
    return state, metrics


def main() -> None:
  with contextlib.redirect_stdout(sys.stderr):
    trainer = Timed(
      arguments=easydel.DistillationConfig(
        temperature=TEMPERATURE,
        alpha=0.5,
        learning_rate=LEARNING_RATE,
        total_batch_size=B,
        max_length=T,
        max_training_steps=c["steps"],
        save_directory=tempfile.mkdtemp(),
        performance_mode=True,  # without logs
        use_wandb=False,
        do_last_save=False,
        resume_if_possible=False,
      ),
      processing_class=None,
      student_model=model_of("student", 0),
      teacher_model=model_of("teacher", 1),
      train_dataset=texts(),
    )
    trainer.train()
  trainer.clock.report(SHAPE, ("easydel", "jax", "flax", "optax"))


if __name__ == "__main__":
  main()
