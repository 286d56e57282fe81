"""The loss by rounding a run's student, on a mesh and on one device, and what is refused."""

import types

import pytest
import tiny

from distill_jax import config
from distill_jax.deployment import calibration, loss, rounding
from distill_jax.deployment.calibration import Calibration
from distill_jax.deployment.rounding import Width
from distill_jax.errors import InputError
from distill_jax.models import loading, vit
from distill_jax.nn import sharding

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
  said = capsys.readouterr().err
  assert f"Rounding to Q4_0 costs {found['kl_to_float']:.3g} nats per token" in said


def test_text_that_is_missing_is_refused_with_what_to_do(tiny_run, run, tmp_path):
  c = resolved(tiny_run, tmp_path, data={"path": str(tmp_path / "gone.txt")})
  with pytest.raises(InputError, match="gone.txt.* export.calibration_tokens=0"):
    loss.of_width(c, run, Width("int8"), Width("F32"))


def test_the_loss_of_other_models_is_not_measured(tiny_run, tmp_path, capsys):
  c, images = resolved(tiny_run, tmp_path), types.SimpleNamespace(config=vit.TINY)
  run = types.SimpleNamespace(student=images)
  assert loss.of_width(c, run, Width("int8"), Width("F32")) == {}
  assert "is measured for decoders of text only" in capsys.readouterr().err
