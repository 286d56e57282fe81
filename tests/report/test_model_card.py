"""The lines of the model card about the losses of a run."""

import pytest

from distill_jax import losses
from distill_jax.report import model_card
from distill_jax.schedules import Schedule


@pytest.mark.parametrize(
  "loss, line",
  [
    (
      losses.KD(weight=0.9, temperature=2.0),
      "- Loss `soft` (kd): weight 0.9, temperature 2.0, teacher teacher, divergence forward_kl",
    ),
    (
      losses.KD(weight=Schedule(((0, 1.0), (9, 0.5)))),
      "- Loss `soft` (kd): weight ((0, 1.0), (9, 0.5)), temperature 1.0, teacher teacher, "
      "divergence forward_kl",
    ),
  ],
)
def test_a_constant_is_one_number_and_a_schedule_its_points(loss, line):
  assert model_card._entry("Loss", "soft", loss) == line
