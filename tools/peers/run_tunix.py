"""Runs Tunix's DistillationTrainer with its LogitStrategy; see tools/bench/peers.py.

  python run_tunix.py small32k

The functions for the model, the labels and the inputs are those that Tunix's own example of logit
distillation has. Its loss is half the KL divergence and half the cross-entropy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from peer_shapes import LEARNING_RATE, SHAPES, TEMPERATURE, StepClock
from tunix.distillation import distillation_trainer, strategies
from tunix.models.qwen3 import model as qwen3
from tunix.sft import utils

SHAPE = sys.argv[1]
c = SHAPES[SHAPE]


def model_of(sizes: dict[str, int], seed: int) -> qwen3.Qwen3:
  config = qwen3.ModelConfig(
    num_layers=sizes["layers"],
    vocab_size=c["vocab"],
    embed_dim=sizes["d"],
    hidden_dim=sizes["ffn"],
    num_heads=sizes["heads"],
    head_dim=sizes["head_dim"],
    num_kv_heads=sizes["kv"],
    rope_theta=1_000_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
  )
  return qwen3.Qwen3(config, rngs=nnx.Rngs(seed))


def forward(model, input_tokens, input_mask, positions, attention_mask):
  del input_mask
  logits, _ = model(input_tokens, positions, None, attention_mask)
  return logits[:, :-1, :]


def labels(input_tokens, input_mask, **_):
  one_hot = jax.nn.one_hot(input_tokens[:, 1:], c["vocab"])
  return one_hot * input_mask[:, 1:].astype(one_hot.dtype)[..., None]


def model_input(x):
  mask = x.input_mask.astype(bool)
  return {
    "input_tokens": x.input_tokens,
    "input_mask": x.input_mask,
    "positions": utils.build_positions_from_mask(mask),
    "attention_mask": utils.make_causal_attn_mask(mask),
  }


def main() -> None:
  strategy = strategies.LogitStrategy(
    student_forward_fn=forward,
    teacher_forward_fn=forward,
    labels_fn=labels,
    temperature=TEMPERATURE,
    alpha=0.5,
  )
  trainer = distillation_trainer.DistillationTrainer(
    student_model=model_of(c["student"], 0),
    teacher_model=model_of(c["teacher"], 1),
    strategy=strategy,
    optimizer=optax.adamw(LEARNING_RATE),
    training_config=distillation_trainer.TrainingConfig(
      eval_every_n_steps=10**9, max_steps=c["steps"]
    ),
  ).with_gen_model_input_fn(model_input)
  rng, clock = np.random.default_rng(0), StepClock(c["warmup"])

  def end_step() -> None:
    jax.block_until_ready(nnx.state(trainer.model, nnx.Param))
    clock.tick()

  def batches():
    for i in range(c["steps"]):
      tokens = rng.integers(1, c["vocab"], (c["batch"], c["seq"]), dtype=np.int32)
      end_step() if i else clock.start()
      yield distillation_trainer.TrainingInput(
        input_tokens=tokens, input_mask=jnp.ones_like(tokens)
      )
    end_step()

  os.chdir(tempfile.mkdtemp())  # the trainer writes checkpoints and logs
  with contextlib.redirect_stdout(sys.stderr):
    trainer.train(batches())
  clock.report(SHAPE, ("google-tunix", "jax", "flax", "optax"))


if __name__ == "__main__":
  main()
