"""The programs that preflight compiles have the arguments, and so the bytes, of a run."""

import importlib
import importlib.util
import math
import re

import jax
import numpy as np
import pytest
import tiny
import tiny_pair
from preflight_config import CONFIGS, model_config

from distill_jax import config
from distill_jax.commands import record
from distill_jax.models import loading
from distill_jax.nn import params, sharding
from distill_jax.preflight import (
  chips,
  estimate,
  flops,
  programs,
)
from distill_jax.training import loader
from distill_jax.training import stores as training_stores


@pytest.mark.parametrize(
  "records",
  [
    {"logp": True},
    {"kind": "topk", "taps": (1,), "taps_width": 8},
  ],
)
def test_the_planned_batch_has_the_shapes_of_the_loader(tmp_path, records):
  c = tiny.tiny(tmp_path)
  c.teacher.source = ""
  c.records.update(records)
  c = config.resolve(c)
  (tmp_path / "records").mkdir()
  record.run(c, tmp_path / "records")
  stores = training_stores.open_stores(c)
  real = next(loader.batches(stores, batch_size=4, seed=0))
  mesh = sharding.make_mesh(fsdp=4)
  about = programs.planned_manifest(c)
  ours = programs.planned_batch(about, programs.placeholder_text(about), ["teacher"], None, 4, mesh)
  shape = lambda x: (x.shape, np.dtype(x.dtype))
  assert jax.tree.map(shape, ours) == jax.tree.map(shape, real)


@pytest.mark.parametrize(
  "verb, changes",
  [
    ("record", {}),
    ("train", {"train.online": True}),
    ("train", {"student.train": "lora", "student.lora.rank": 2}),
  ],
)
def test_argument_bytes_agree_with_the_compiler(verb, changes):
  c = model_config()
  c.update_from_flattened_dict(changes)
  program = programs.lower(config.resolve(c), verb, sharding.make_mesh(fsdp=2, tensor=2))
  memory = program.lowered.compile().memory_analysis()
  given = sum(program.arguments.values())
  assert given == pytest.approx(memory.argument_size_in_bytes, abs=200)  # scalars and keys


@pytest.mark.parametrize(
  "verb, changes",
  [
    ("record", {"records.student_tokenizer": "student.json"}),
    ("train", {"train.online": True, "retarget.tokenizer": "student.json"}),
  ],
)
def test_a_teacher_with_another_tokenizer(tmp_path, verb, changes):
  """The projection is compiled, and its tables are on every device."""
  c = tiny_pair.teacher_config(tmp_path, 100)
  c.losses.soft = config.loss("kd")
  c.data.seq_len, c.retarget.seq_len = 16, 24
  c.train.batch_size = c.records.batch_size = 4
  plain = config.resolve(c)
  named = {key: str(tmp_path / x) if isinstance(x, str) else x for key, x in changes.items()}
  c.update_from_flattened_dict(named)
  c, mesh = config.resolve(c), sharding.make_mesh(fsdp=2, tensor=2)
  program = programs.lower(c, verb, mesh)
  memory = program.lowered.compile().memory_analysis()
  # The compiler drops the student's inputs, 3 integers of 24 positions, which `record` only stores.
  unused = 3 * 4 * 24 * 2 if verb == "record" else 0
  given = sum(program.arguments.values()) - unused
  assert given == pytest.approx(memory.argument_size_in_bytes, abs=200)
  cost = flops.step_flops(c, verb, 4)
  head = cost["head"] if verb == "record" else cost["teacher"]
  whole = flops.forward_flops(loading.open_source(plain.teacher), 4, 16)
  expected = whole.head * flops.PROJECTED_HEAD * 24 / 16  # for the student's 24 positions
  assert head == pytest.approx(expected + (0 if verb == "record" else whole.total - whole.head))


def test_argument_bytes_without_compiling():
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  for changes in (
    {},
    {"student.train": "lora", "student.lora.rank": 2},
    {"student.train": "frozen", "student.frozen": ("model.embed_tokens",)},
  ):
    c = model_config()
    c.update_from_flattened_dict(changes)
    c = config.resolve(c)
    for verb in ("train", "record"):
      told = programs.lower(c, verb, mesh).arguments
      want = sum(n for name, n in told.items() if name != "batch")
      assert estimate.argument_bytes(c, verb, mesh) == pytest.approx(want, rel=0.01)


def test_a_named_shape_replaces_the_source():
  c = model_config()
  c.teacher.source = "hub:somebody/model"
  c = programs.without_weights(config.resolve(c))
  assert c.teacher.source == "" and params.count(loading.open_source(c.teacher).abstract)


LONG = ("r1_qwen_7b", "r1_qwen_32b", "r1_llama_70b", "r1_record")
R1 = [
  (path, seq_len)
  for path in sorted(CONFIGS.glob("r1_*.py"))
  if path.stem != "r1_standin"  # its steps are those of the others
  for seq_len in ("4096", "32768", "131072")
  if seq_len == "32768" or "r1_sft" not in path.stem  # configs/r1_sft_*.py have one length
  if seq_len != "131072" or path.stem in LONG
]


@pytest.mark.parametrize(("path", "seq_len"), R1, ids=lambda x: getattr(x, "stem", x))
def test_the_r1_configs_fit_the_slices_in_their_docstrings(path, seq_len, monkeypatch):
  """The slice has the size of the mesh, and the batch is divisible by it."""
  monkeypatch.syspath_prepend(CONFIGS)
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  made = module.get_config() if "r1_sft" in path.stem else module.get_config(seq_len)
  c = programs.without_weights(config.resolve(made))
  verb = "record" if path.stem == "r1_record" else "train"
  model = c.teacher if verb == "record" else c.student
  assert c.data.seq_len == int(seq_len) <= loading.open_source(model).config.max_position_embeddings
  assert estimate.total_tokens(c, verb) == 2**33 >> (verb == "record")
  rented = r"on\s(v5p:4x4x4)" if c.mesh.context > 1 else r"--topology=(\S+)"
  size = chips.parse(re.search(rented, module.__doc__)[1])[1]
  shape = sharding.mesh_shape(**vars(c.mesh), devices=size)
  rows = c.records.batch_size if verb == "record" else c.train.batch_size
  assert rows % (shape[0] * shape[1]) == 0 and math.prod(shape) == size


@pytest.mark.parametrize(
  "student", ["qwen_1_5b", "qwen_7b", "qwen_14b", "qwen_32b", "llama_8b", "llama_70b"]
)
@pytest.mark.parametrize("seq_len", ["4096", "32768"])
def test_a_stand_in_for_r1_changes_nothing_of_the_step(student, seq_len, monkeypatch):
  """So the estimates in the docstrings of the students hold for both teachers."""
  monkeypatch.syspath_prepend(CONFIGS)
  read = lambda name, given: importlib.import_module(name).get_config(given).to_dict()
  ours = read(f"r1_{student}", seq_len)
  stands_in = read("r1_standin", f"{student}:{seq_len}")
  assert ours["teacher"]["family"] == "deepseek_v3" != stands_in["teacher"]["family"]
  assert ours["train"]["records"] == (ours["train"]["heldout"][0].removesuffix("/heldout"),)
  for c in (ours, stands_in):
    del c["teacher"], c["retarget"], c["train"]["records"], c["train"]["heldout"]
    del c["records"]["batch_size"], c["records"]["heldout_sequences"]
  assert ours == stands_in
