"""Distils a small ViT into smaller students on Fashion-MNIST, with and without labels.

  apt-get install dataset-fashion-mnist    # MIT; four files under /usr/share/datasets
  distill-jax train    --config=configs/fashion.py:teacher   --workdir=runs/fashion/teacher
  distill-jax record   --config=configs/fashion.py           --workdir=runs/fashion/records

then for seeds 0, 1 and 2 (--config.seed=0 …), and with seed 0 for :deit and :conv:

  distill-jax train    --config=configs/fashion.py:hard      --workdir=runs/fashion/hard_0
  distill-jax train    --config=configs/fashion.py:distilled --workdir=runs/fashion/distilled_0
  distill-jax evaluate --config=configs/fashion.py           --workdir=runs/fashion
  distill-jax export   --config=configs/fashion.py           --workdir=runs/fashion/distilled_0

`hard` is trained on the 60,000 labels, and `distilled` on the teacher's outputs for all images,
without labels. Both are the same ViT, trained for the same number of steps on shifted and mirrored
images, with four views of each image. The teacher is recorded on the same views (arXiv:2106.05237).
`deit` is a DeiT of the same size, whose distillation token is trained on the teacher. `conv` is a
ConvNeXt with half of the parameters.

With few labels, the teacher is a ConvNeXt that is trained on 1% of the labels:

  C=configs/fashion.py R=runs/fashion
  distill-jax train    --config=$C:few_teacher   --workdir=$R/few_teacher
  distill-jax record   --config=$C:few_distilled --workdir=$R/few_records

then for seeds 0, 1 and 2:

  distill-jax train    --config=$C:few_hard      --workdir=$R/few_hard_0
  distill-jax train    --config=$C:few_distilled --workdir=$R/few_distilled_0
  distill-jax evaluate --config=$C:few_distilled --workdir=$R/few_evaluation

Both students are the ViT. `few_hard` is trained on the same labels (with 400 views of each image),
`few_distilled` on the teacher's outputs for all images. The difference is what a teacher gains from
unlabelled images.

Expected results on the 10,000 test images: the mean of seeds 0, 1 and 2 (minimum - maximum), and of
seed 0 for `deit` and `conv`:

  |                          | accuracy            | ce    | KL to the teacher     | parameters |
  |--------------------------|---------------------|-------|-----------------------|------------|
  | teacher                  | 85.4%               | 0.405 | 0                     | 306,826    |
  | hard, all 60,000 labels  | 79.8% (79.2 - 80.4) | 0.551 | 0.169 (0.167 - 0.172) | 19,658     |
  | distilled, no labels     | 79.8% (79.2 - 80.6) | 0.546 | 0.159 (0.151 - 0.169) | 19,658     |
  | deit                     | 79.4%               | 0.567 | 0.183                 | 20,052     |
  | conv                     | 80.4%               | 0.513 | 0.165                 | 9,430      |

Students without labels are as good as students with all labels. With 1% of the labels:

  |                            | accuracy            | ce    | KL to its teacher     | parameters |
  |----------------------------|---------------------|-------|-----------------------|------------|
  | few_teacher, 600 labels    | 79.6%               | 1.438 | 0                     | 55,850     |
  | few_hard, 600 labels       | 75.8% (75.8 - 75.9) | 1.514 | 1.027 (0.997 - 1.066) | 19,658     |
  | few_distilled, all images  | 79.5% (79.3 - 79.7) | 0.829 | 0.357 (0.352 - 0.362) | 19,658     |

Cost on one core: 14 minutes for the teacher, 7 to record it, 4 for a student on labels, 7 to 9 for
a student on records; with few labels, 11 minutes for the teacher, 5 to record it, and 4 for a
student.
"""

from distill_jax import config

DATA = "/usr/share/datasets/fashion-mnist"
CLASSES = (
  "T-shirt or top",
  "trouser",
  "pullover",
  "dress",
  "coat",
  "sandal",
  "shirt",
  "sneaker",
  "bag",
  "ankle boot",
)
RUNS = "runs/fashion"
FEW = {"labelled": 0.01, "which": "labelled", "views": 400}  # 1% of the labels
IMAGE = {"image_size": 28, "num_channels": 1, "num_labels": 10}
CONVNEXT = {
  **IMAGE,
  "patch_size": 2,
  "hidden_sizes": (12, 24),
  "depths": (1, 1),
  "layer_scale_init_value": 1.0,
}
LARGE_CONVNEXT = CONVNEXT | {"hidden_sizes": (32, 64)}
VIT = {
  **IMAGE,
  "patch_size": 7,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
LARGE_VIT = VIT | {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4}
STEPS = {"teacher": 3000, "few_teacher": 3000, "few_hard": 6000, "few_distilled": 6000}


def get_config(role: str = "distilled"):
  c = config.base()
  c.tasks.fashion = config.task(
    "image_classes",
    train=f"{DATA}/train",
    heldout=f"{DATA}/t10k",
    classes=CLASSES,
    size=28,
    channels=1,
    mean=(0.286,),
    std=(0.353,),
    augment=("shift", "flip"),
    views=4,
  )
  c.augmentations.shift = config.augmentation("crop", pad=2)
  c.augmentations.flip = config.augmentation("flip")

  c.teacher.source = f"run:{RUNS}/teacher"
  c.records.kind, c.records.batch_size = "dense", 250
  c.student.family, c.student.shape, c.student.changes = "vit", "tiny", VIT
  c.optim.peak_lr, c.optim.weight_decay, c.optim.warmup_steps = 2e-3, 0.05, 50
  c.train.batch_size = 128
  c.train.steps = STEPS.get(role, 2000)
  c.train.keep = 1

  if role == "teacher":
    c.student.changes, c.optim.peak_lr = LARGE_VIT, 1e-3
    c.losses.hard = config.loss("ce")
  elif role == "distilled":
    c.train.records = (f"{RUNS}/records",)
    c.losses.soft = config.loss("kd", temperature=2.0)
  elif role == "conv":
    c.student.family, c.student.changes = "convnext", CONVNEXT
    c.train.records = (f"{RUNS}/records",)
    c.losses.soft = config.loss("kd", temperature=2.0)
  elif role == "deit":
    c.student.family = "deit"
    c.train.records = (f"{RUNS}/records",)
    c.losses.hard = config.loss("ce", weight=0.5)
    c.losses.soft = config.loss("pseudo_label", weight=0.5)
  elif role == "hard":
    c.losses.hard = config.loss("ce")
  elif role == "few_teacher":
    c.tasks.fashion.update(FEW)
    c.student.family, c.student.changes = "convnext", LARGE_CONVNEXT
    c.losses.hard = config.loss("ce")
  elif role == "few_hard":
    c.tasks.fashion.update(FEW)
    c.losses.hard = config.loss("ce")
  elif role == "few_distilled":
    c.teacher.source = f"run:{RUNS}/few_teacher"
    c.train.records = (f"{RUNS}/few_records",)
    c.losses.soft = config.loss("kd", temperature=2.0)
  else:
    roles = "teacher, distilled, conv, deit, hard, few_teacher, few_hard or few_distilled"
    raise ValueError(f"The role is {role!r}; expected {roles}. Choose one of them.")

  few = "few_" if role.startswith("few_") else ""
  runs = [f"{few}{name}_{seed}" for name in ("hard", "distilled") for seed in range(3)]
  runs += [] if few else ["deit_0", "conv_0"]
  c.evaluate.models = {name: f"run:{RUNS}/{name}" for name in runs}
  c.evaluate.batch_size = 500
  c.export.dir, c.export.dtype = f"{RUNS}/export", "float32"
  return c
