"""A CLIP of a ninth of its teacher's size learns the teacher's affinities, on Fashion-MNIST.

  apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb runs/fashion
  python tools/fashion_captions.py runs/fashion/usr/share/datasets/fashion-mnist runs/fashion
  C=configs/fashion_clip.py R=runs/fashion
  distill-jax train --config=$C:teacher --workdir=$R/teacher
  for seed in 0 1 2; do
    distill-jax train --config=$C:hard      --config.seed=$seed --workdir=$R/hard$seed
    distill-jax train --config=$C:distilled --config.seed=$seed --workdir=$R/distilled$seed
  done
  distill-jax evaluate --config=$C           --workdir=$R
  distill-jax export   --config=$C:distilled --workdir=$R/distilled0

The captions are made from labels (tools/fashion_captions.py): no person wrote them, and a text
tells the class of its image and no more. The teacher (0.67 M parameters) sees 20,000 pairs three
times, the students (0.08 M) 2,000 of them fifteen times: `hard` by InfoNCE alone, `distilled` also
by the teacher's affinities (TinyCLIP, arXiv:2309.12314) and embeddings (CLIP-KD,
arXiv:2307.12732). On what is held out, 5,000 test images under ten texts, text_recall in
evaluation.json is zero-shot accuracy. Expect, the mean of three seeds (from least to most):

  |           | zero-shot accuracy  | ce in batches of 250     | KL to the teacher | parameters |
  |-----------|---------------------|--------------------------|-------------------|------------|
  | teacher   | 84.3%               | 3.68                     | 0                 | 669,313    |
  | hard      | 75.2% (74.6 - 76.3) | 4.11                     | 0.477             | 76,785     |
  | distilled | 77.4% (75.9 - 78.8) | 3.91                     | 0.274             | 76,785     |

The distilled student is the better one in every seed. The teacher has seen ten times as many
pairs, and that is a part of it. CPU time: 166 s for the teacher, 41 to 87 s for a student.
"""

from distill_jax import config

R = "runs/fashion"
TOKENS = {"vocab_size": 35, "max_position_embeddings": 12, "bos_token_id": 33, "eos_token_id": 34}
IMAGE = {"image_size": 28, "patch_size": 7, "num_channels": 1}


def tower(width: int, layers: int, **more: int) -> dict[str, int]:
  return {
    "hidden_size": width,
    "intermediate_size": 4 * width,
    "num_hidden_layers": layers,
    "num_attention_heads": 4,
    **more,
  }


def get_config(arm: str = "distilled"):
  c = config.base()
  c.tasks.pairs = config.task(
    "image_text",
    path=f"{R}/small.jsonl",
    heldout=f"{R}/heldout.jsonl",
    tokenizer=f"{R}/tokenizer.json",
    size=28,
    channels=1,
    mean=(0.286,),
    std=(0.353,),
    max_tokens=12,
  )
  c.teacher.source = f"run:{R}/teacher"
  c.student.family, c.student.shape = "clip", "tiny"
  c.student.changes = {
    "vision": tower(48, 2, **IMAGE),
    "text": tower(32, 1, **TOKENS),
    "projection_dim": 32,
  }
  c.train.steps, c.train.batch_size = 240, 125  # 15 times through
  c.optim.peak_lr, c.optim.warmup_steps, c.optim.b2 = 2e-3, 20, 0.98

  c.losses.hard = config.loss("ce")  # InfoNCE in both directions
  if arm == "teacher":
    c.tasks.pairs.path = f"{R}/train.jsonl"
    c.student.changes = {
      "vision": tower(128, 3, **IMAGE),
      "text": tower(64, 1, **TOKENS),
      "projection_dim": 64,
    }
    c.train.steps, c.optim.peak_lr = 480, 1e-3  # 3 times through
  elif arm == "distilled":
    c.train.online = True
    c.losses.affinity = config.loss("kd")
    c.losses.features = config.loss("embedding", projection="orthogonal")
  elif arm != "hard":
    raise ValueError(f"fashion_clip.py:{arm} is neither :teacher, :hard nor :distilled")
  c.train.checkpoint_every, c.train.keep = 1000, 1

  students = [f"{arm}{seed}" for arm in ("hard", "distilled") for seed in range(3)]
  c.evaluate.models = {name: f"run:{R}/{name}" for name in students}
  c.evaluate.batch_size = 250
  c.export.dir = f"{R}/export"
  return c
