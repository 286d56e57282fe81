"""What the command export refuses before it reads or measures anything."""

import pytest
import tiny

from distill_jax import config
from distill_jax.commands import export
from distill_jax.errors import InputError


def resolved(folder, **options):
  c = tiny.tiny(folder)
  c.export.dir = str(folder / "out")
  c.export.update(options)
  return config.resolve(c)


def test_wrong_keys_are_refused_before_anything_is_read(tmp_path):
  c = resolved(tmp_path, format="gguf", quant="int4")
  with pytest.raises(InputError, match="export.quant is 'int4'; expected one of F32"):
    export.run(c, tmp_path / "no run")


@pytest.mark.parametrize(
  "options, message",
  [
    ({"quant": "int4", "group": 24}, "export.group is 24; expected a divisor of 64, the number of"),
    ({"format": "gguf"}, "The tokenizer has no token that ends a text"),
  ],
)
def test_a_student_without_a_place_in_the_format_is_refused_before_anything_is_measured(
  options, message, tiny_run, tmp_path, monkeypatch
):
  monkeypatch.setattr(export.loss, "of_width", None)
  c = resolved(tmp_path, **options)
  with pytest.raises(InputError, match=message):
    export.run(c, tiny_run / "whole")
  assert not (tmp_path / "out").exists()
