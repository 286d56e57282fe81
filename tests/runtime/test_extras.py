"""Optional packages: declared in pyproject.toml, and named in one sentence where missing."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny_store

from distill_jax.errors import InputError
from distill_jax.runtime import extras

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITH_JAX = {"ml-dtypes", "scipy"}
WITH_ETILS = {"fsspec"}
# Extras for the command line of some machine or task, and not for the others.
NOT_IN_ALL = {
  *("all", "docs", "gcs", "lm-eval", "mlflow", "s3", "test", "tpu", "trackio", "wandb"),
}


def distributions(requirements):
  """Returns the names in a list of requirements, as pip compares them."""
  return {normal(re.split(r"[\s<>=!~;\[]", r)[0]) for r in requirements}


def normal(name):
  return re.sub(r"[-_.]+", "-", name).lower()


CORE = distributions(PROJECT["dependencies"])
EXTRAS = {normal(k): distributions(v) for k, v in PROJECT["optional-dependencies"].items()}


def imports(tree, extra=None):
  """Yields (module, extra) of every absolute import; extra: of the `needed` around it."""
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
      continue
    if isinstance(node, ast.Import):
      yield from ((alias.name, extra) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
      yield node.module, extra
    inner = extra
    if isinstance(node, ast.With):
      call = node.items[0].context_expr
      if ast.unparse(call).startswith("extras.needed("):
        inner = call.args[0].value
    yield from imports(node, inner)


def third_party():
  """Yields (file, distribution, extra) of every import of a package that is not ours."""
  ours = {*sys.stdlib_module_names, "distill_jax", "_typeshed"}
  for path in sorted((ROOT / "distill_jax").rglob("*.py")):
    for module, extra in imports(ast.parse(path.read_text())):
      if module.partition(".")[0] not in ours:
        yield path.relative_to(ROOT), normal(extras.distribution(module)), extra


# Their absence is handled where they are used: tasks skip the metric, filters start a process.
BY_OTHER_MEANS = {
  "distill_jax/tasks/_scores.py": "text",
  "distill_jax/filters/_math_worker.py": "data",
}


def test_every_import_is_of_the_core_or_of_a_named_extra():
  for path, distribution, extra in third_party():
    extra = extra or BY_OTHER_MEANS.get(str(path))
    if extra is None:
      assert distribution in CORE | WITH_JAX | WITH_ETILS, f"{path} imports {distribution}"
    else:
      assert distribution in EXTRAS[normal(extra)], f"{path}: {extra!r} lacks {distribution}"


def test_no_dependency_is_unused():
  used = {distribution for _, distribution, _ in third_party()}
  # Flags of tfds; and the packages that fsspec and jax import on their own.
  used |= {"importlib-resources", "gcsfs", "s3fs", "jax", "distill-jax"}
  declared = CORE.union(*(EXTRAS[e] for e in EXTRAS if e not in ("docs", "test")))
  assert declared <= used


def test_all_holds_every_extra_for_any_machine():
  inner = re.search(r"\[(.*)\]", PROJECT["optional-dependencies"]["all"][0])[1]
  assert {normal(e) for e in inner.split(",")} == EXTRAS.keys() - NOT_IN_ALL


BLOCKED = """
import importlib.abc, sys
import numpy as np

class Block(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in %r:
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""

CORE_ONLY = """
import jax.numpy as jnp
import distill_jax
from distill_jax import config
from distill_jax.losses import kd
from distill_jax.nn import fused_head
from distill_jax.records import store

assert config.loss("kd").weight == 1.0
record = store.open_store(sys.argv[1])[0]
assert record["weight_TK"].sum() > 0
"""

SITES = """
from distill_jax.errors import InputError

def tokenizer():
  from distill_jax.data import tokenizers
def hub():
  from distill_jax.hub.locate import locate
  locate("hub:org/name")
def training():
  from distill_jax.training import loader
def metrics():
  from distill_jax.training.metric_writer import MetricsWriter
  MetricsWriter("nowhere")
def checkpoints():
  from distill_jax.runtime import checkpoint
def chat():
  from distill_jax.data import sandboxed_jinja
def gguf():
  from distill_jax.hub import gguf_file
def images():
  from distill_jax.augmentations import crop, rand_augment  # their keys need no Pillow
  rand_augment.changed(np.zeros((4, 4, 3), np.uint8), "posterize", 0.5)
def serve():
  from distill_jax.generation import http_client
def tfds():
  from distill_jax.data import sources
  next(sources.documents(sources.DocumentSource("tfds", "nowhere")))
def gcs():
  from distill_jax.runtime import storage
  storage.run_folder("gs://bucket/folder")

for site in (tokenizer, hub, training, metrics, checkpoints, chat, gguf, images, serve, tfds, gcs):
  try:
    site()
  except InputError as error:
    print(f"{site.__name__}: {error}")
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  folder = tmp_path_factory.mktemp("store") / "records"
  tiny_store.record(folder)
  return folder


MODULES = {
  "PIL",
  "gcsfs",
  "gguf",
  "grain",
  "httpx2",
  "huggingface_hub",
  "jinja2",
  "orbax",
  "sentencepiece",
  "tensorboardX",
  "tensorflow_datasets",
  "tokenizers",
}


def run(code, *args):
  script = BLOCKED % MODULES + code
  return subprocess.run(
    [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, check=True
  ).stdout


def test_the_core_alone_has_the_head_the_losses_and_stores(store):
  run(CORE_ONLY, store)


def test_each_missing_package_is_named_with_its_extra():
  found = dict(line.split(": ", 1) for line in run(SITES).splitlines())
  wanted = {
    "tokenizer": ("sentencepiece", "train"),
    "hub": ("huggingface-hub", "train"),
    "training": ("grain", "train"),
    "metrics": ("tensorboardX", "train"),
    "checkpoints": ("orbax-checkpoint", "train"),
    "chat": ("jinja2", "train"),
    "gguf": ("gguf", "gguf"),
    "images": ("pillow", "images"),
    "serve": ("httpx2", "serve"),
    "tfds": ("tensorflow-datasets", "tfds"),
    "gcs": ("gcsfs", "gcs"),
  }
  assert found == {
    site: f"{name} is not installed; expected the packages of the extra {extra!r}. "
    f"Run pip install 'distill-jax[{extra}]'."
    for site, (name, extra) in wanted.items()
  }


def test_a_package_that_fails_to_import_is_another_sentence():
  message = r"gguf cannot be imported \(broken\)\. Run pip install"
  with pytest.raises(InputError, match=message), extras.needed("gguf"):
    raise ImportError("broken", name="gguf")
