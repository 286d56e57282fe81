"""The loss by rounding a run's student, on a mesh and on one device, and what is refused."""

import dataclasses
import shutil
import types
from pathlib import Path

import gguf
import pytest
import tiny

from distill_jax import config
from distill_jax.commands import export
from distill_jax.deployment import calibration, loss, mixed_precision, rounding
from distill_jax.deployment.calibration import Calibration
from distill_jax.deployment.rounding import Width
from distill_jax.errors import InputError
from distill_jax.models import loading, vit
from distill_jax.nn import sharding
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime import json_io

TOKENS = 100  # 4 rows of 32


def resolved(folder, tmp_path, **changes):
  c = tiny.tiny(tmp_path)
  c.teacher.source = f"run:{folder / 'teacher'}"
  c.export.calibration_tokens = TOKENS
  c.update(changes)
  return config.resolve(c)


@pytest.fixture(scope="module")
def run(tiny_run):
  return loading.open_run(tiny_run / "whole")


def test_the_loss_on_a_mesh_is_that_on_one_device(tiny_run, run, tmp_path, capsys):
  c = resolved(tiny_run, tmp_path)
  found = loss.of_width(c, run, Width("Q4_0"), Width("Q8_0"))
  mesh = sharding.make_mesh(devices=sharding.make_mesh().devices.flat[:1])
  text = calibration.read_text(c, run.student, mesh)
  assert 0 < found["kl_to_float"] < 0.1 and found["calibration_tokens"] == text.labels == 4 * 31
  model = calibration.as_float32(run.load(mesh, run.student.compute))
  alone = Calibration(model, text.batches, run.student.compute, mesh, 16, text.vocab_size)
  widths = dict.fromkeys(rounding.layer_tensors(model), Width("Q4_0"))
  kl, increase = alone.loss(rounding.round_model(model, widths, Width("Q8_0")))
  assert found["kl_to_float"] == pytest.approx(kl, rel=1e-4)  # sums in another order
  assert found["loss_increase"] == pytest.approx(increase, abs=1e-6)
  printed = capsys.readouterr().err
  what = "Rounding to Q4_0 (the embedding and head to Q8_0)"
  assert f"{what} costs {found['kl_to_float']:.3g} nats per token" in printed


def test_weights_on_the_grid_of_training_stay_while_the_table_is_rounded(
  tiny_run, run, tmp_path, capsys
):
  c = resolved(tiny_run, tmp_path)
  q = dataclasses.replace(c.student, train="quantised", quantise=QuantiseOptions("Q4_0"))
  c = dataclasses.replace(c, student=q)
  exact, rounded = (loss.of_width(c, run, Width("Q4_0"), Width(w)) for w in ("F32", "Q4_0"))
  assert exact["kl_to_float"] == pytest.approx(0, abs=1e-6)
  assert rounded["kl_to_float"] > 1e-4
  assert "Rounding the embedding and head to Q4_0 costs" in capsys.readouterr().err


def test_text_that_is_missing_is_refused_with_what_to_do(tiny_run, run, tmp_path):
  c = resolved(tiny_run, tmp_path, data={"path": str(tmp_path / "gone.txt")})
  with pytest.raises(InputError, match="gone.txt.* export.calibration_tokens=0"):
    loss.of_width(c, run, Width("int8"), Width("F32"))


def test_the_loss_of_other_models_is_not_measured(tiny_run, tmp_path, capsys):
  c, images = resolved(tiny_run, tmp_path), types.SimpleNamespace(config=vit.TINY)
  run = types.SimpleNamespace(student=images)
  assert loss.of_width(c, run, Width("int8"), Width("F32")) == {}
  assert "is measured for decoders of text only" in capsys.readouterr().err


@pytest.fixture
def exported(tiny_run, tmp_path):
  """Exports a copy of the run, with some keys of `export`; returns the summary."""
  shutil.copytree(tiny_run / "whole", tmp_path / "run")
  (folder := tmp_path / "tokenizer").mkdir()
  tiny.write_tokenizer(folder / "tokenizer.json")
  (folder / "tokenizer_config.json").write_text('{"eos_token": "!"}')

  def run(**keys):
    c = tiny.tiny(tmp_path)
    c.data.tokenizer, c.export.calibration_tokens = str(folder), TOKENS
    c.export.update({"dir": str(tmp_path / f"out{len(list(tmp_path.glob('out*')))}"), **keys})
    return export.run(config.resolve(c), tmp_path / "run")

  return run


def test_an_export_says_what_rounding_costs_unless_asked_not_to(exported):
  of_8, of_4 = exported(quant="int8"), exported(format="gguf", quant="Q4_0")
  assert 0 < of_8["kl_to_float"] < of_4["kl_to_float"]
  for keys in ({"quant": "Q8_0", "calibration_tokens": 0}, {"quant": "F16"}):
    assert "kl_to_float" not in exported(format="gguf", **keys)


def test_the_widths_of_a_file_are_chosen_for_its_size(exported, tmp_path, capsys):
  all_4 = exported(format="gguf", quant="Q4_0")
  with pytest.raises(
    InputError, match=r"target_bytes is 1; expected at least (\d+), the size"
  ) as e:
    exported(format="gguf", target_bytes=1)
  assert f"at least {all_4['bytes']}," in str(e.value)
  target = all_4["bytes"] * 5 // 4
  summary = exported(format="gguf", target_bytes=target)
  chosen = json_io.read_object(Path(summary["export_dir"], "widths.json"), "")
  assert summary["bytes"] == chosen["file_bytes"] <= target < summary["bytes"] + 32 * 64 * 2
  assert summary["kl_to_float"] == chosen["kl_to_float"] < all_4["kl_to_float"]
  (file,) = Path(summary["export_dir"]).glob("*.gguf")
  found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
  rows = chosen["tensors"]
  assert {name: row["width"] for name, row in rows.items()} == {n: found[n] for n in rows}
  assert len(rows) == 3 * 7 and len({row["width"] for row in rows.values()}) > 1
  printed = capsys.readouterr().err
  assert len([line for line in printed.splitlines() if line.startswith("blk.")]) == 3 * 7
  kept = json_io.read_object(tmp_path / "run" / mixed_precision.MEASURED, "")
  assert kept["kl"] == {name: row["kl"] for name, row in rows.items()}
