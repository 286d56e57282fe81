"""Fashion-MNIST: a ConvNeXt teaches a ViT a tenth of its size; then with few labels."""

from distill_jax import config

DATA = "/usr/share/datasets/fashion-mnist"
CLASSES = (
  "T-shirt or top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
  "ankle boot",
)  # fmt: skip
RUNS = "runs/fashion"
IMAGE = {"image_size": 28, "num_channels": 1, "num_labels": 10}
CONVNEXT = {
  **IMAGE, "patch_size": 2, "hidden_sizes": (32, 64), "depths": (2, 2),
  "layer_scale_init_value": 1.0,
}  # fmt: skip
VIT = {
  **IMAGE, "patch_size": 7, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
  "num_attention_heads": 4,
}  # fmt: skip


def get_config(role: str = "distilled"):
  c = config.base()
  c.tasks.fashion = config.task(
    "image_classes", train=f"{DATA}/train", heldout=f"{DATA}/t10k", classes=CLASSES, size=28,
    channels=1, mean=(0.286,), std=(0.353,), augment=("shift", "flip"),
  )  # fmt: skip
  c.augmentations.shift = config.augmentation("crop", pad=2)
  c.augmentations.flip = config.augmentation("flip")

  c.teacher.source = f"run:{RUNS}/teacher"
  c.records.kind, c.records.batch_size, c.records.sequences_per_shard = "dense", 250, 20_000
  c.student.family, c.student.shape, c.student.changes = "vit", "tiny", VIT
  c.optim.peak_lr, c.optim.weight_decay, c.optim.warmup_steps = 2e-3, 0.05, 50
  c.train.batch_size = 128
  c.train.steps = c.train.checkpoint_every = 600
  c.train.keep = 1

  if role == "teacher":
    c.student.family, c.student.changes = "convnext", CONVNEXT
    c.losses.hard = config.loss("ce")
  elif role == "distilled":
    c.train.records = (f"{RUNS}/records",)
    c.losses.soft = config.loss("kd", temperature=2.0, missing_mass="renormalise")
  elif role == "hard":
    c.losses.hard = config.loss("ce")
  elif role == "few":
    c.tasks.fashion.update(labelled=0.01, which="labelled", views=100)
    c.losses.hard = config.loss("ce")
  else:
    raise ValueError(f"configs/fashion.py:{role} is none of teacher, distilled, hard and few")

  c.evaluate.models = {
    f"{name}_{seed}": f"run:{RUNS}/{name}_{seed}"
    for seed in range(3)
    for name in ("hard", "distilled", "few")
  }
  c.evaluate.batch_size = 500
  c.export.dir, c.export.dtype = f"{RUNS}/export", "float32"
  return c
