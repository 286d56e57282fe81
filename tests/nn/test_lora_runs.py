"""Runs that train adapters: resumed, exported merged and alone, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import parity
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny_run import train

from distill_jax import config
from distill_jax.commands import export
from distill_jax.commands.evaluate import run as evaluate
from distill_jax.commands.record import run as record
from distill_jax.errors import InputError
from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.models import llama, loading, runs
from distill_jax.nn import layers, lora, params, sharding
from distill_jax.runtime import checkpoint
from distill_jax.training.metric_writer import read_metrics

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def lora_config(folder):
  """Returns a config of a student with adapters on a folder's weights, and a teacher."""
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.student.source = str(folder / "base")
  c.student.train, c.student.lora.rank = "lora", 4
  c.student.lora.targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("lora")
  shape = {k: v for k, v in llama.TINY.to_hf().items() if k != "model_type"}
  model = parity.torch_model("llama", **shape)
  model.save_pretrained(path / "base")
  c = lora_config(path)
  record(config.resolve(c), path / "records")
  train(c, path / "whole")
  return path


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder):
  shutil.copytree(folder / "whole", folder / "stopped")
  shutil.rmtree(folder / "stopped" / "checkpoints" / "6")
  train(lora_config(folder), folder / "stopped")
  mesh = sharding.make_mesh()
  whole, stopped = (loading.open_run(folder / name).restore(mesh) for name in ("whole", "stopped"))
  jax.tree.map(np.testing.assert_array_equal, whole, stopped)
  mine = lambda name: [{k: r[k] for k in ("step", "loss", "grad_norm")} for r in read_metrics(name)]
  assert mine(folder / "whole") == mine(folder / "stopped")
  rows = read_metrics(folder / "whole")
  assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_checkpoint_contains_only_adapters(folder):
  """A checkpoint has the adapters and their two moments, but no weight of the base."""
  where = folder / "whole" / "checkpoints" / "6" / checkpoint.STATE
  held = ocp.PyTreeCheckpointer().metadata(where).item_metadata.tree
  numbers = sum(int(np.prod(x.shape)) for x in held.values() if x.shape)
  adapters = loading.open_run(folder / "whole").restore(sharding.make_mesh())
  assert numbers == 3 * params.count(adapters)
  assert {path for path in held if path.startswith("params.")} == {
    f"params.layers.{name}.{part}" for name in ("q", "v", "o", "gate", "down") for part in "ab"
  }


def exported(folder, compute):
  """Shared by the tests of this module."""
  c, out = lora_config(folder), folder / f"export-{compute}"
  c.export.dir, c.export.lora, c.export.dtype = str(out), compute, "float32"
  if not out.exists():
    export.run(config.resolve(c), folder / "whole")
  return out


def test_every_export_is_the_model_that_was_trained(folder):
  """Merged exports, and PEFT adapters on the exported base, have the logits of the run."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  opened = open_model(str(folder / "base"))
  base = load.load_model(opened, mesh, layers.ComputeConfig())
  adapters = loading.open_run(folder / "whole").restore(mesh)
  tokens_BT = parity.tokens() % llama.TINY.vocab_size
  ours = parity.plain_logits(lora.with_adapters(base, adapters), tokens_BT)
  assert parity.error(parity.plain_logits(base, tokens_BT), ours) > 0.01  # training had an effect
  auto = transformers.AutoModelForCausalLM

  def error(model):
    with torch.no_grad():
      return parity.error(model(torch.from_numpy(tokens_BT).long()).logits, ours)

  assert error(auto.from_pretrained(exported(folder, "merged")).eval()) < parity.FORWARD
  at = exported(folder, "peft")
  on = auto.from_pretrained(exported(folder, "base"))
  assert error(peft.PeftModel.from_pretrained(on, at).eval()) < parity.FORWARD
  assert error(peft.AutoPeftModelForCausalLM.from_pretrained(at).eval()) < parity.FORWARD
  about = json.loads((at / "adapter_config.json").read_text())
  assert about["base_model_name_or_path"] == str(folder / "base")
  assert (about["r"], about["lora_alpha"], about["peft_type"]) == (4, 16.0, "LORA")
  assert not (at / "config.json").exists() and (at / "tokenizer.json").exists()
  card = (at / "README.md").read_text()
  assert "rank 4, alpha 16, on q_proj, v_proj, o_proj, gate_proj, down_proj" in card


def test_the_exported_base_is_unchanged(folder):
  """In the merged export, every weight without an adapter equals the base's, bit for bit."""
  pretrained = load_file(folder / "base" / "model.safetensors")
  base = load_file(exported(folder, "base") / "model.safetensors")
  whole = load_file(exported(folder, "merged") / "model.safetensors")
  assert pretrained.keys() == base.keys() == whole.keys()
  targets = lora_config(folder).student.lora.targets
  for name in pretrained:
    np.testing.assert_array_equal(pretrained[name], base[name], err_msg=name)
    adapted = name.split(".")[-2] in targets
    assert np.array_equal(pretrained[name], whole[name]) != adapted, name


def test_a_run_with_adapters_can_be_evaluated_and_be_a_teacher(folder):
  """`start` is the base. A run, as a source, is the base with its adapters."""
  c = lora_config(folder)
  c.evaluate.models = {"mine": f"run:{folder / 'whole'}", "merged": str(exported(folder, "merged"))}
  c.evaluate.batch_size = 4
  models = evaluate(config.resolve(c), folder)["models"]
  assert models["mine"]["kl"] < models["start"]["kl"]
  assert models["mine"]["ce"] == pytest.approx(models["merged"]["ce"], rel=1e-6)
  assert models["mine"]["parameters"] == models["start"]["parameters"]
  c.teacher.source = f"run:{folder / 'whole'}"
  spec = config.resolve(c).teacher
  before = loading.open_source(spec, 0).identity["digest"]
  assert (
    before != loading.open_source(config.resolve(lora_config(folder)).student, 0).identity["digest"]
  )


@pytest.mark.slow
def test_a_random_bfloat16_base_with_a_trained_projection(folder):
  """The base depends on the seed, adapters stay float32, and PEFT files name no base."""
  c = lora_config(folder)
  c.student.source = ""
  c.student.param_dtype = c.student.dtype = "bfloat16"
  c.student.remat = "dots"
  c.records.taps, c.records.taps_width = (1,), 48
  c.losses = {"hidden": config.loss("hidden", layers="2:1", projection="least_squares")}
  c.train.records, c.train.steps = (str(folder / "taps"),), 2
  record(config.resolve(c), folder / "taps")
  train(c, folder / "random")
  # Without fitting it is 0.85; 32 numbers for 124 positions explain half of the targets.
  assert read_metrics(folder / "random")[0]["hidden"] < 0.6
  mesh = sharding.make_mesh()
  adapters = loading.open_run(folder / "random").restore(mesh)
  assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
  spec, key = config.resolve(c).student, runs.keys(0)["student"]
  base = loading.open_source(spec).load(mesh, key).model
  of_run = config.StudentOptions(source=f"run:{folder / 'random'}", param_dtype="bfloat16")
  jax.tree.map(
    np.testing.assert_array_equal,
    loading.open_source(of_run).load(mesh, key).model,
    lora.merge_adapters(base, adapters),
  )
  c.export.dir, c.export.lora = str(folder / "random-peft"), "peft"
  export.run(config.resolve(c), folder / "random")
  about = json.loads((folder / "random-peft" / "adapter_config.json").read_text())
  assert about["base_model_name_or_path"] is None


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rank": -1}, "lora.rank is -1; expected at least 1"),
    ({"alpha": 0.0}, "lora.alpha is 0.0; expected a positive number"),
    ({"alpha": float("nan")}, "alpha is nan"),
    ({"rank": 33}, "rank is 33; expected at most 32 because layers.q is 32 by 32"),
    ({"rank": 17, "targets": ("k_proj",)}, "at most 16 because layers.k is 32 by 16"),
    ({"targets": ()}, r"targets is \(\); expected distinct module names"),
    ({"targets": ("q_proj", "q_proj")}, "expected distinct module names"),
    (
      {"targets": ("q_prj",)},
      "targets is 'q_prj'; expected modules among down_proj, .*q_proj, up_proj",
    ),
    ({"targets": ("roj",)}, "targets is 'roj'; expected modules among"),
    ({"targets": ("lm_head",)}, "targets is 'lm_head'; expected modules among"),
  ],
)
def test_adapters_that_do_not_fit_are_refused_before_anything_runs(folder, changes, message):
  c = lora_config(folder)
  for key, value in changes.items():
    c.student.lora[key] = value
  with pytest.raises(InputError, match=message):
    train(c, folder / f"refused-{abs(hash(message))}")


def test_a_teacher_has_no_adapters(folder):
  tree = lora_config(folder).to_dict()
  tree["teacher"]["lora"] = {"rank": 2}
  with pytest.raises(InputError, match="'teacher.lora' is unknown"):
    config.from_dict(tree)


@pytest.fixture
def another_norm(folder):
  """Changes the base's weights after the run."""
  file = folder / "base" / "model.safetensors"
  pretrained = file.read_bytes()
  weights = load_file(file)
  weights["model.norm.weight"] = weights["model.norm.weight"] + 1
  save_file(weights, file, {"format": "pt"})
  yield
  file.write_bytes(pretrained)


def test_another_base_is_refused(folder, tmp_path, another_norm):
  """A run with a changed base is not resumed, exported or used as a teacher."""
  run, c = shutil.copytree(folder / "whole", tmp_path / "run"), lora_config(folder)
  shutil.rmtree(run / "checkpoints" / "6")
  message = "were trained on .*base with digest .*, but its digest is now"
  with pytest.raises(InputError, match=message):
    train(c, run)
  c.export.dir = str(tmp_path / "out")
  for compute in ("merged", "peft", "base"):
    c.export.lora = compute
    with pytest.raises(InputError, match=message):
      export.run(config.resolve(c), run)
  with pytest.raises(InputError, match=message):
    loading.open_source(config.ModelOptions(source=f"run:{run}")).load(
      sharding.make_mesh(), jax.random.key(0)
    )
  (run / "base.json").unlink()
  with pytest.raises(InputError, match="lacks base.json, which names the base model"):
    export.run(config.resolve(c), run)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "compute, rank, message",
  [
    ("adapter", 4, "export.lora is 'adapter'; expected 'merged', 'peft' or 'base'"),
    ("peft", 0, "export.lora is 'peft'; expected 'merged', because this run has not"),
  ],
)
def test_invalid_exports_are_refused(folder, compute, rank, message):
  c = lora_config(folder)
  c.export.lora, c.export.dir = compute, str(folder / "none")
  if not rank:
    c.student.train, c.student.lora = "whole", config.base().student.lora
  with pytest.raises(InputError, match=message):
    export.run(config.resolve(c), folder / "whole")
  assert not (folder / "none").exists()


def test_a_failed_export_leaves_nothing(folder, monkeypatch):
  from distill_jax.hub import export_folder

  def full(*_):
    raise OSError("no space left")

  monkeypatch.setattr(export_folder, "_write_file", full)
  c = lora_config(folder)
  c.export.dir, c.export.lora = str(folder / "failed"), "peft"
  with pytest.raises(OSError, match="no space"):
    export.run(config.resolve(c), folder / "whole")
  assert not [p for p in folder.iterdir() if "failed" in p.name]
