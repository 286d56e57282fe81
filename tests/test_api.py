"""The public names of the package: they are lazy, complete, and load and export models."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoints import CONFIG, tensors, write_folder

import distill_jax as dj
from distill_jax.nn import sharding
from distill_jax.types import Inputs


def inputs(B=2, T=8):
  tokens = np.arange(B * T).reshape(B, T) % CONFIG.vocab_size
  return Inputs(tokens, np.tile(np.arange(T), (B, 1)), np.ones((B, T), int))


def test_importing_the_package_imports_neither_jax_nor_tensorflow():
  code = (
    "import sys, distill_jax\n"
    "heavy = {'jax', 'flax', 'optax', 'tensorflow_datasets', 'numpy'} & set(sys.modules)\n"
    "sys.exit(f'{heavy} were imported' if heavy else 0)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [n for n in dj.__all__ if n != "LMEvalAdapter"])
def test_every_public_name_can_be_imported(name):
  assert getattr(dj, name) is not None
  assert name in dir(dj)


def test_the_lm_eval_adapter_is_named_as_well():
  pytest.importorskip("lm_eval", reason="lm-eval is not installed")
  assert dj.LMEvalAdapter.__module__ == "distill_jax.evals.lm_eval"


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="has no attribute 'fused_heads'"):
    _ = dj.fused_heads


def test_type_checkers_see_the_names_that_are_exported():
  """The imports under TYPE_CHECKING are those of _EXPORTS, one by one."""
  import ast
  import inspect

  tree = ast.parse(inspect.getsource(dj))
  (block,) = [node for node in tree.body if isinstance(node, ast.If)]
  seen = {}
  for node in block.body:
    for alias in node.names:
      module = node.module.removeprefix("distill_jax").lstrip(".")
      seen[alias.asname or alias.name] = (module, alias.name)
  for name, target in dj._EXPORTS.items():
    module, _, attribute = target.partition(":")
    parent, _, last = module.rpartition(".")
    assert seen.pop(name) == ((module, attribute) if attribute else (parent, last)), name
  assert not seen
  assert sorted([*dj._EXPORTS, "InputError", "__version__"]) == sorted(dj.__all__)


def test_a_folder_is_loaded_with_its_tokenizer_and_exported_again(tmp_path):
  folder = write_folder(tmp_path / "source")
  loaded = dj.load_model(folder)
  assert loaded.tokenizer.vocab_size == CONFIG.vocab_size
  out = loaded(inputs())
  assert out.hidden_BTD.shape == (2, 8, CONFIG.hidden_size)
  jitted = jax.jit(lambda model, x: model(x, loaded.compute))(loaded.model, inputs())
  np.testing.assert_allclose(out.hidden_BTD, jitted.hidden_BTD, rtol=1e-5, atol=1e-5)

  summary = dj.export_model(loaded, tmp_path / "out", dtype="float32")
  assert summary["parameters"] == sum(x.size for x in tensors().values())
  again = dj.load_model(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, again.model, loaded.model)
  assert again.tokenizer.digest == loaded.tokenizer.digest
  assert again.identity["digest"] != ""


def test_a_changed_model_takes_its_tokenizer_from_a_source(tmp_path):
  folder = write_folder(tmp_path / "source")
  student = dj.load_model(folder, keep_layers=(0, 3))
  model = jax.tree.map(lambda x: x * 0.5, student.model)
  dj.export_model(model, tmp_path / "out", like=folder, dtype="float32")
  again = dj.load_model(str(tmp_path / "out"))
  assert again.config.num_hidden_layers == 2
  jax.tree.map(np.testing.assert_array_equal, again.model, model)
  assert again.tokenizer.digest == student.tokenizer.digest


def test_a_run_gives_its_tokenizer(tmp_path, tiny_run):
  """The model of the run has no tokenizer of its own: the run's config names one."""
  run = f"run:{tiny_run / 'whole'}"
  loaded = dj.load_model(run)
  dj.export_model(loaded.model, tmp_path / "out", like=run, dtype="float32")
  assert dj.load_model(tmp_path / "out").tokenizer.digest == loaded.tokenizer.digest


def test_a_model_is_loaded_onto_a_mesh(tmp_path):
  folder = write_folder(tmp_path / "source")
  mesh = dj.make_mesh(data=1, fsdp=2, tensor=2)
  loaded = dj.load_model(folder, mesh)
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(loaded.model)} == {4}
  with jax.set_mesh(mesh):
    batch = jax.device_put(inputs(), sharding.batch_sharding(mesh))
    got = jax.jit(lambda model, x: model(x, loaded.compute))(loaded.model, batch)
  want = dj.load_model(folder)(inputs())
  # Weights of size 1 make activations that are sensitive to the order of float32 sums.
  np.testing.assert_allclose(got.hidden_BTD, want.hidden_BTD, rtol=1e-3, atol=1e-3)


def test_inputs_of_rows_have_positions_that_begin_at_0_in_each_segment():
  tokens, segments = np.arange(6)[None] % 5, np.array([[1, 1, 2, 2, 2, 0]])
  for make in (dj.Inputs.of, jax.jit(dj.Inputs.of)):
    made = make(tokens, segments)
    np.testing.assert_array_equal(made.positions_BT, [[0, 1, 0, 1, 2, 0]])
    np.testing.assert_array_equal(made.segments_BT, segments)
    assert made.tokens_BT.dtype == made.positions_BT.dtype == made.segments_BT.dtype == np.int32
  np.testing.assert_array_equal(dj.Inputs.of(tokens).positions_BT, [np.arange(6)])
  np.testing.assert_array_equal(dj.Inputs.of(tokens).segments_BT, np.ones((1, 6)))


def test_documents_are_packed_into_rows():
  rows = list(dj.pack([[1, 2, 3], [4, 5]], seq_len=4, eos_id=0))
  np.testing.assert_array_equal(rows[0].tokens_T, [1, 2, 3, 0])
  np.testing.assert_array_equal(rows[1].segments_T, [1, 1, 1, 0])


def test_a_random_model_is_loaded_by_family_and_shape():
  loaded = dj.load_model(family="llama", shape="tiny", seed=3)
  assert loaded.identity == {"name": "llama tiny", "digest": "random, seed 3"}
  with pytest.raises(dj.InputError, match="llama tiny has no tokenizer"):
    _ = loaded.tokenizer


def test_bad_arguments(tmp_path):
  with pytest.raises(dj.InputError, match="does not exist"):
    dj.load_model(tmp_path / "nowhere")
  with pytest.raises(dj.InputError, match="option of load_model is 'shapes'; expected one of"):
    dj.load_model(family="llama", shapes="tiny")
  with pytest.raises(dj.InputError, match="Make it with distill_jax.make_mesh"):
    dj.load_model(family="llama", shape="tiny", mesh=jax.make_mesh((4,), ("x",)))


def test_the_reference_lists_all_losses():
  reference = Path(__file__).parent.parent / "docs/reference.md"
  section = reference.read_text().partition("::: distill_jax.losses\n")[2]
  listed = set(re.search(r"members: \[(.*?)\]", section)[1].split(", "))
  of_the_package = {"fused_loss", "logits_loss"}  # which are names of distill_jax, too
  assert listed | of_the_package == set(dj.losses.__all__)
