"""The flags of the command line, except the keys of the config."""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/demo.py")
TEACHER = flags.DEFINE_string("teacher", None, "distill: the model to distil from")
STUDENT = flags.DEFINE_string(
  "student",
  "half",
  "distill: the model to train, or half (the default), third, … of the teacher's layers",
)
DATA = flags.DEFINE_string("data", None, "distill: a file or folder of text, or JSON lines")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; a path or a URL such as gs://…")
JSON = flags.DEFINE_bool("json", False, "prints the result as one JSON object on the last line")
DISTRIBUTED = flags.DEFINE_string(
  "distributed", "", "joins the processes of a run: 'auto', or HOST:PORT,COUNT,INDEX"
)
PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps", "", "profiles the steps FIRST:END, e.g. 10:13 for steps 10 to 12"
)
TOPOLOGY = flags.DEFINE_string("topology", None, "preflight: the TPU slice, e.g. v5p:4x4x4")
NUM_SLICES = flags.DEFINE_integer("num_slices", None, "preflight: number of such slices")
VERB = flags.DEFINE_string("verb", None, "preflight: train, record, generate or on_policy")
