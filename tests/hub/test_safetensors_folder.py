"""The safetensors reader: agreement with the safetensors library, and errors."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from distill_jax.errors import InputError
from distill_jax.hub.safetensors_folder import INDEX, SINGLE, SafetensorsFolder

pytestmark = pytest.mark.smoke

rng = np.random.default_rng(0)
TENSORS = {
  "a": rng.standard_normal((6, 4)).astype(np.float32),
  "b": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
  "c": rng.standard_normal(7).astype(np.float16),
  "d": np.arange(4),
  "empty": np.zeros((0, 3), np.float32),
}


def write_shards(folder, shards: dict[str, dict], index: dict[str, str] | None = None):
  for name, tensors in shards.items():
    save_file(tensors, folder / name)
  if index is None:
    index = {t: name for name, tensors in shards.items() for t in tensors}
  (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def two(folder, **change):
  write_shards(folder, {"1.safetensors": {"a": TENSORS["a"]}, "2.safetensors": {"b": TENSORS["b"]}})
  if change:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(change)
    (folder / INDEX).write_text(json.dumps(index))


def raw(folder, header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  n = len(text) if length is None else length
  (folder / SINGLE).write_bytes(n.to_bytes(8, "little") + text + data)


def test_one_file_and_its_slices(tmp_path):
  save_file(TENSORS, tmp_path / SINGLE)
  weights = SafetensorsFolder(tmp_path)
  assert weights.names() == TENSORS.keys()
  for name, x in TENSORS.items():
    assert weights.shape(name) == x.shape and weights.dtype(name) == x.dtype
    np.testing.assert_array_equal(weights.read(name), x)
  np.testing.assert_array_equal(
    weights.read("a", (slice(2, 5), slice(1, 3))), TENSORS["a"][2:5, 1:3]
  )


def test_shards(tmp_path):
  two(tmp_path)
  weights = SafetensorsFolder(tmp_path)
  assert [Path(f.path).name for f in weights.files] == ["1.safetensors", "2.safetensors"]
  for name in "ab":
    np.testing.assert_array_equal(weights.read(name), TENSORS[name])


def test_shards_can_be_links_as_in_the_cache_of_the_hub(tmp_path):
  blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
  blobs.mkdir(), snapshot.mkdir()
  two(blobs)
  for f in blobs.iterdir():
    (snapshot / f.name).symlink_to(f)
  assert SafetensorsFolder(snapshot).names() == {"a", "b"}


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
  "not json": (b"{nonsense", b"", None, "not JSON"),
  "not utf-8": (b'{"\xff": 1}', b"", None, "not JSON"),
  "not an object": (b"[1, 2]", b"", None, "list; expected one object"),
  "nested without end": (b"[" * 100_000, b"", None, "not JSON"),
  "a number of 5000 digits": (b'{"x": ' + b"9" * 5000 + b"}", b"", None, "not JSON"),
  "absurd length": (b"{}", b"", 2**63, "its header claims 9223372036854775808"),
  "length past the end": (b"{}", b"", 3, "its header claims 3"),
  "named twice": (b'{"x": 1, "x": 2}', b"", None, "has the key 'x' twice"),
  "no dtype": (
    {"x": {"shape": [2], "data_offsets": [0, 8]}},
    bytes(8),
    None,
    "does not have dtype, shape",
  ),
  "unknown dtype": ({"x": F32 | {"dtype": "F31"}}, bytes(8), None, "has dtype 'F31'"),
  "negative size": ({"x": F32 | {"shape": [-2]}}, bytes(8), None, "has shape"),
  "size true": ({"x": F32 | {"shape": [True, 2]}}, bytes(8), None, "has shape"),
  "wrong size": ({"x": F32 | {"shape": [3]}}, bytes(8), None, "does not take the 8 bytes"),
  "huge size": (
    {"x": F32 | {"shape": [2**62, 2**62]}},
    bytes(8),
    None,
    "does not take the 8 bytes",
  ),
  "overlap": ({"x": F32, "y": F32}, bytes(8), None, "starts at byte"),
  "hole": ({"x": F32, "y": F32 | {"data_offsets": [12, 20]}}, bytes(20), None, "starts at byte"),
  "truncated": ({"x": F32}, bytes(7), None, "it is truncated or damaged"),
  "junk": ({"x": F32}, bytes(9), None, "it is truncated or damaged"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_raises(case, tmp_path):
  header, data, length, word = HEADERS[case]
  raw(tmp_path, header, data, length)
  with pytest.raises(InputError, match=word):
    SafetensorsFolder(tmp_path)


def test_a_file_of_a_few_bytes_raises(tmp_path):
  (tmp_path / SINGLE).write_bytes(b"\0\0\0")
  with pytest.raises(InputError, match="has 3 bytes"):
    SafetensorsFolder(tmp_path)


def test_a_missing_shard_raises(tmp_path):
  two(tmp_path)
  (tmp_path / "2.safetensors").unlink()
  with pytest.raises(InputError, match="lists 2.safetensors, which is not in the folder"):
    SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
  "name", ["../x.safetensors", "/x.safetensors", "a\\x.safetensors", "x.bin"]
)
def test_an_index_with_files_outside_the_folder_raises(name, tmp_path):
  save_file({"x": TENSORS["a"]}, tmp_path / "x.safetensors")
  inside = tmp_path / "model"
  inside.mkdir()
  two(inside, x=name)
  with pytest.raises(InputError, match="not a safetensors file in its folder"):
    SafetensorsFolder(inside)


def test_a_tensor_in_two_shards_raises(tmp_path):
  shards = {"1.safetensors": {"a": TENSORS["a"]}, "2.safetensors": {"a": TENSORS["a"]}}
  write_shards(tmp_path, shards, {"a": "1.safetensors", "b": "2.safetensors"})
  with pytest.raises(InputError, match="a is in both 1.safetensors and 2.safetensors"):
    SafetensorsFolder(tmp_path)


def test_an_index_at_odds_with_its_shards(tmp_path):
  two(tmp_path, a="2.safetensors")
  with pytest.raises(InputError, match="lists a in 2.safetensors, but it is not in this file"):
    SafetensorsFolder(tmp_path)
  two(tmp_path, z="2.safetensors")
  with pytest.raises(InputError, match="lists z in 2.safetensors, but it is not in this file"):
    SafetensorsFolder(tmp_path)
  shard = {"a": TENSORS["a"], "more": TENSORS["c"]}
  write_shards(tmp_path, {"1.safetensors": shard}, {"a": "1.safetensors"})
  with pytest.raises(InputError, match="1.safetensors contains more"):
    SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(text, tmp_path):
  (tmp_path / INDEX).write_text(text)
  with pytest.raises(InputError, match="no weight_map"):
    SafetensorsFolder(tmp_path)


def test_two_sets_of_weights(tmp_path):
  two(tmp_path)
  save_file(TENSORS, tmp_path / SINGLE)
  with pytest.raises(InputError, match="contains both"):
    SafetensorsFolder(tmp_path)


def test_a_pickle_and_nothing(tmp_path):
  with pytest.raises(InputError, match="contains neither"):
    SafetensorsFolder(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(InputError, match="pytorch_model.bin, a pickle"):
    SafetensorsFolder(tmp_path)
