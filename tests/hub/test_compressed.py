"""Integer weights of compressed-tensors: the layout, slices, and errors."""

import jax
import ml_dtypes
import numpy as np
import pytest
from read_weights import check_values_and_slices
from tiny_checkpoints import CONFIG, tensors, write_folder

from distill_jax.errors import InputError
from distill_jax.hub import compressed, load
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, sharding

pytestmark = pytest.mark.smoke

Q = "model.layers.2.self_attn.q_proj.weight"
# (bits, group, format): all that this project reads.
KINDS = [(4, 0, "pack-quantized"), (4, 8, "pack-quantized"), (8, 16, "pack-quantized")]
KINDS += [(8, 0, "int-quantized")]


def words(q_RC: np.ndarray, bits: int) -> np.ndarray:
  """The documented layout, one integer at a time: column i at bit i * bits, with an offset."""
  out = []
  for row in q_RC:
    number = sum(int(q) + 2 ** (bits - 1) << i * bits for i, q in enumerate(row))
    out.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), "<i4"))
  return np.stack(out)


def scheme(bits=4, group=0, form="pack-quantized", **weights):
  about = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
  about |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
  config_groups = {"group_0": {"targets": ["Linear"], "weights": about | weights}}
  return {"quant_method": "compressed-tensors", "format": form, "config_groups": config_groups}


def quantised(bits=4, group=0, form="pack-quantized", seed=0) -> tuple[dict, dict]:
  """Returns (stored tensors, their values)."""
  rng, stored, true = np.random.default_rng(seed), {}, {}
  for name, x in tensors().items():
    stored[name] = true[name] = x
    if ".layers." not in name or x.ndim < 2:
      continue
    del stored[name]
    q = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), x.shape).astype(np.int8)
    scale = rng.uniform(0.1, 3, (len(x), x.shape[1] // (group or x.shape[1])))
    scale = stored[name + "_scale"] = scale.astype(ml_dtypes.bfloat16)
    wide = np.repeat(scale.astype(np.float64), group or x.shape[1], 1)
    true[name] = (q * wide).astype(np.float32)  # exact: 15 bits
    if form == "pack-quantized":
      stored[name + "_packed"] = words(q, bits)
      stored[name + "_shape"] = np.array(x.shape, np.int64)
    else:
      stored[name] = q
  return stored, true


def folder_of(path, stored, quantization):
  return write_folder(path, CONFIG, stored, CONFIG.to_hf() | {"quantization_config": quantization})


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_of_words(bits):
  every = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)
  q = np.random.default_rng(0).permuted(np.tile(every, (5, 1)), axis=1)
  np.testing.assert_array_equal(compressed.pack(q, bits), words(q, bits))
  np.testing.assert_array_equal(compressed.unpack(words(q, bits), bits), q)


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_and_any_slice_of_them(kind, tmp_path, monkeypatch):
  monkeypatch.setattr(compressed, "ROWS", 3)  # several blocks, the last of them smaller
  stored, true = quantised(*kind)
  weights = open_model(str(folder_of(tmp_path, stored, scheme(*kind)))).weights
  check_values_and_slices(weights, true)


def test_a_model_has_the_dequantised_values(tmp_path):
  stored, true = quantised(*KINDS[1])
  mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
  read = lambda path: load.load_model(open_model(str(path)), mesh, layers.ComputeConfig())
  got = read(folder_of(tmp_path / "a", stored, scheme(*KINDS[1])))
  want = read(write_folder(tmp_path / "b", CONFIG, true))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "change",
  [
    {"num_bits": 2},
    {"num_bits": 8.0},
    {"type": "float"},
    {"symmetric": False},
    {"actorder": "group"},
    {"strategy": "tensor"},
    {"strategy": "group", "group_size": 0},
  ],
)
def test_other_variants_are_refused(change, tmp_path):
  path = folder_of(tmp_path, {}, scheme(**change))
  with pytest.raises(InputError, match="variant of compressed-tensors that cannot be read"):
    open_model(str(path))


def test_other_configs_are_refused(tmp_path):
  two = scheme()
  two["config_groups"]["group_1"] = scheme(8)["config_groups"]["group_0"]
  rotated = scheme() | {"transform_config": {"config_groups": {"R1": {}}}}
  broken = [{**scheme(), "config_groups": c} for c in (None, {}, [], {"a": None}, {"a": {}})]
  other = scheme(form="int-quantized")  # with 4 bits
  for i, quantization in enumerate([two, rotated, other, *broken]):
    with pytest.raises(InputError, match="cannot be read"):
      open_model(str(folder_of(tmp_path / str(i), {}, quantization)))


def test_integers_and_scales_that_do_not_fit(tmp_path):
  def opened(**changes):
    stored, _ = quantised()
    for end, x in changes.items():
      stored[Q + "_" + end] = x
    return open_model(str(folder_of(tmp_path / "model", stored, scheme()))).weights

  with pytest.raises(InputError, match=rf"{Q}_packed is int8 with shape"):
    opened(packed=np.zeros((32, 4), np.int8))
  with pytest.raises(InputError, match=rf"{Q}_scale is int32; expected an int32 matrix and"):
    opened(scale=np.zeros((32, 1), np.int32))
  with pytest.raises(InputError, match=rf"{Q}_scale has shape \(32, 2\); expected a scale for"):
    opened(scale=np.zeros((32, 2), np.float32))
  with pytest.raises(InputError, match=r"_scale has shape \(32, 0\)"):
    opened(packed=np.zeros((32, 0), np.int32), scale=np.zeros((32, 0), np.float32))


def test_missing_and_additional_tensors(tmp_path):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])

  def check(stored, message):
    path = folder_of(tmp_path / "model", stored, scheme())
    with pytest.raises(InputError, match=message):
      load.load_model(open_model(str(path)), mesh, layers.ComputeConfig())

  whole, _ = quantised()
  check({n: x for n, x in whole.items() if n != Q + "_scale"}, f"lacks the tensor {Q}")
  check({n: x for n, x in whole.items() if n != Q + "_packed"}, f"lacks the tensor {Q}")
  check(whole | {Q + "_zero_point": np.zeros((32, 1), np.int32)}, "contains .*_zero_point")
  check(whole | {Q: np.zeros((32, 32), np.float32)}, f"contains .*{Q} twice")
  narrow = whole | {Q + "_packed": np.zeros((32, 3), np.int32)}
  check(narrow, rf"{Q} has shape \(32, 24\); expected \(32, 32\)")


def test_the_message_for_other_methods(tmp_path):
  path = write_folder(
    tmp_path, hf=CONFIG.to_hf() | {"quantization_config": {"quant_method": "awq"}}
  )
  with pytest.raises(InputError, match="quantised by 'awq', but only block-scaled 'fp8' and 'comp"):
    open_model(str(path))
