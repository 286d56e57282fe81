"""The formats that the keys of `export` choose, and the keys that contradict each other."""

import pytest

from distill_jax.errors import InputError
from distill_jax.hub import formats
from distill_jax.hub.formats import Format
from distill_jax.hub.options import ExportOptions
from distill_jax.nn.quantise import QuantiseOptions

NONE, INT4 = QuantiseOptions(), QuantiseOptions("int4", 64)


@pytest.mark.parametrize(
  "keys, trained, want",
  [
    ({}, NONE, ("hf", "float", 0, "BF16", False)),
    ({}, INT4, ("hf", "int4", 64, "BF16", False)),
    ({"group": 64}, INT4, ("hf", "int4", 64, "BF16", False)),
    ({"quant": "float"}, INT4, ("hf", "float", 0, "BF16", False)),
    ({"quant": "int8"}, INT4, ("hf", "int8", 0, "BF16", True)),
    ({"quant": "int4", "group": 32}, NONE, ("hf", "int4", 32, "BF16", True)),
    ({}, QuantiseOptions("Q8_0"), ("hf", "float", 0, "BF16", False)),
    ({"format": "gguf"}, NONE, ("gguf", "F16", 0, "F16", False)),
    ({"format": "gguf"}, INT4, ("gguf", "F16", 0, "F16", False)),
    ({"format": "gguf"}, QuantiseOptions("Q4_0"), ("gguf", "Q4_0", 0, "Q8_0", True)),
    (
      {"format": "gguf", "embedding": "F32"},
      QuantiseOptions("Q4_0"),
      ("gguf", "Q4_0", 0, "F32", False),
    ),
    ({"format": "gguf", "embedding": "Q4_0"}, NONE, ("gguf", "F16", 0, "Q4_0", True)),
    ({"format": "gguf", "quant": "Q8_0"}, NONE, ("gguf", "Q8_0", 0, "Q8_0", True)),
    (
      {"format": "gguf", "quant": "Q4_0", "embedding": "F16"},
      QuantiseOptions("Q8_0"),
      ("gguf", "Q4_0", 0, "F16", True),
    ),
    ({"format": "gguf", "target_bytes": 10}, NONE, ("gguf", "F16", 0, "Q8_0", True)),
  ],
)
def test_the_numbers_of_an_export(keys, trained, want):
  assert formats.choose(ExportOptions(**keys), trained) == Format(*want)


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"format": "onnx"}, "export.format is 'onnx'; expected one of hf, gguf"),
    ({"quant": "Q8_0"}, "export.quant is 'Q8_0'; expected one of float, int8, int4 with .*'hf'"),
    (
      {"format": "gguf", "quant": "int8"},
      "export.quant is 'int8'; expected one of F32, F16, BF16, Q8_0, Q4_0 with .*'gguf'",
    ),
    ({"group": 32}, "export.group is 32; expected 0 because the weights are in 'float'"),
    ({"quant": "int8", "group": -1}, "export.group is -1; expected 0 or a positive number"),
    ({"embedding": "F16"}, "export.embedding is 'F16'; expected '' with export.format='hf'"),
    ({"target_bytes": 9}, "export.target_bytes is 9; expected 0 with export.format='hf'"),
    ({"format": "gguf", "embedding": "x"}, "export.embedding is 'x'; expected one of F32"),
    ({"format": "gguf", "dtype": "float32"}, "export.dtype is 'float32'.*Set export.quant"),
    (
      {"format": "gguf", "quant": "F16", "target_bytes": 9},
      "export.quant is 'F16'; expected '' with export.target_bytes",
    ),
    (
      {"format": "gguf", "calibration_tokens": 0, "target_bytes": 9},
      "export.calibration_tokens is 0; expected a number of tokens",
    ),
    (
      {"format": "gguf", "draft": True, "target_bytes": 9},
      "export.draft is True; expected False with export.target_bytes",
    ),
    ({"lora": "peft", "format": "gguf"}, "export.format is 'gguf'; expected 'hf' with .*'peft'"),
    ({"lora": "base", "quant": "int8"}, "export.quant is 'int8'; expected 'float' with .*'base'"),
  ],
)
def test_keys_that_contradict_each_other(keys, message):
  with pytest.raises(InputError, match=message):
    formats.choose(ExportOptions(**keys), NONE)


def test_another_group_than_that_of_training_is_refused():
  with pytest.raises(InputError, match="export.group is 32; expected 64, as in student.quantise"):
    formats.choose(ExportOptions(group=32), INT4)
