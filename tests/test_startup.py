"""What a command imports before it does its work: a bad config fails before anything heavy."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.smoke

CONFIG = """
from distill_jax import config
def get_config():
  c = config.base()
  c.losses.soft = config.loss("kd")
  c.filters.short = config.filter("length", max_chars=50)
  return c
"""
# Each stage may import the libraries of the stages before it.
SCRIPT = """
import sys

def check(*libraries):
  assert not (found := set(libraries) & set(sys.modules)), found

from distill_jax import cli
check("absl", "flax", "jax", "ml_collections", "numpy")

config = cli.parse(["distill-jax", "--config=" + sys.argv[1]])
assert config.losses["soft"].divergence == "forward_kl"
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
check("array_record", "fsspec", "jinja2", "scipy", "tokenizers", "jax.experimental.pallas")

from distill_jax.commands import evaluate, filter, generate, inspect, pack, record, report, retarget
check("orbax.checkpoint", "tensorstore", "scipy.optimize", "scipy.stats")

from distill_jax.commands import chain, distill, export, shrink, train
check("torch", "transformers", "tensorflow", "tensorboardX", "huggingface_hub", "PIL")
"""


def test_what_a_command_imports(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, tmp_path / "config.py"], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
