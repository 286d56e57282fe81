"""Runs a distillation trainer of TRL; see tools/bench/peers.py.

python run_trl.py small32k gkd|distill

gkd      GKDTrainer with lmbda=0: fixed texts, a teacher in the step, logits of both models. It
         ignores its temperature in the loss, which is the forward KL divergence alone.
distill  DistillationTrainer, whose loss is computed in tiles of the vocabulary. It trains on
         texts of the student; fixed texts take their place, so generation is not measured.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TRL_EXPERIMENTAL_SILENCE": "1"}
warnings.simplefilter("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peer_shapes import (  # noqa: E402
  LEARNING_RATE,
  SHAPES,
  TEMPERATURE,
  StepClock,
  qwen3_config,
)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
  PreTrainedTokenizerFast,
  Qwen3Config,
  Qwen3ForCausalLM,
  TrainerCallback,
)
from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402

SHAPE, TRAINER = sys.argv[1:]
c = SHAPES[SHAPE]
V, B, T = c["vocab"], c["batch"], c["seq"]
tokens = torch.Generator().manual_seed(0)


def model_of(name: str, seed: int) -> Qwen3ForCausalLM:
  torch.manual_seed(seed)
  sizes = qwen3_config(SHAPE, name) | {"max_position_embeddings": max(T, 512)}
  ids = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
  return Qwen3ForCausalLM(Qwen3Config(**sizes, rms_norm_eps=1e-6, **ids)).float()


def tokenizer() -> PreTrainedTokenizerFast:
  vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3}
  made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  return PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
  )


class Clock(TrainerCallback):
  """Times the steps of a trainer."""

  def __init__(self) -> None:
    self.clock = StepClock(c["warmup"])

  def on_train_begin(self, *_: Any, **__: Any) -> None:
    self.clock.start()

  def on_step_end(self, *_: Any, **__: Any) -> None:
    self.clock.tick()


def random_texts(n: int) -> tuple[torch.Tensor, torch.Tensor]:
  """Returns the ids and the mask of n texts."""
  ids = torch.randint(3, V, (n, T), generator=tokens)
  return ids, torch.ones_like(ids)


def collate(examples: list) -> dict[str, torch.Tensor]:
  ids, ones = random_texts(len(examples))
  batch = {"input_ids": ids, "attention_mask": ones, "labels": ids.clone()}
  return batch | {"prompts": ids[:, :1], "prompt_attention_mask": ones[:, :1]}


class FixedTexts(DistillationTrainer):
  """A trainer on fixed texts instead of those of the student."""

  def _generate_and_score_completions(self, inputs: list) -> dict[str, torch.Tensor]:
    ids, ones = random_texts(len(inputs))
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": ones[:, :1]}
    batch |= {"completion_ids": ids[:, 1:], "completion_mask": ones[:, 1:]}
    return batch | {"num_items_in_batch": torch.tensor(float(len(inputs) * (T - 1)))}


def trainer(clock: Clock) -> Any:
  common = {
    "output_dir": tempfile.mkdtemp(),
    "per_device_train_batch_size": B,
    "max_steps": c["steps"],
    "gradient_accumulation_steps": 1,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "logging_strategy": "no",
    "temperature": TEMPERATURE,
    "beta": 0.0,  # the forward KL divergence
  }
  rows = B * c["steps"]
  shared = {
    "model": model_of("student", 0),
    "teacher_model": model_of("teacher", 1),
    "processing_class": tokenizer(),
  }
  if TRAINER == "gkd":
    return GKDTrainer(
      args=GKDConfig(lmbda=0.0, **common),
      data_collator=collate,
      callbacks=[clock],
      train_dataset=Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]] * rows}),
      **shared,
    )
  return FixedTexts(
    args=DistillationConfig(max_completion_length=T - 1, **common),
    callbacks=[clock],
    train_dataset=Dataset.from_dict({"prompt": ["a"] * rows}),
    **shared,
  )


def main() -> None:
  clock = Clock()
  with contextlib.redirect_stdout(sys.stderr):
    trainer(clock).train()
  clock.clock.report(SHAPE, ("trl", "transformers", "torch"))


if __name__ == "__main__":
  main()
