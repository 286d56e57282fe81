"""Damaged files either raise InputError or are read with the declared shapes.

Other exceptions, crashes of the process (a fault in C would end pytest) and tensors with other
shapes are failures. A flipped byte in the weights cannot be detected in either format, but a
changed length, name, type or offset must be.
"""

import math

import jax
import numpy as np
import pytest
from tiny_checkpoints import CONFIG, tensors, torch_shapes, write_folder, write_gguf

from distill_jax.errors import InputError
from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.hub.safetensors_folder import SafetensorsFolder
from distill_jax.nn import layers, sharding

pytestmark = pytest.mark.smoke

SMALL = {n: x[:4, :4] if x.ndim == 2 else x[:4] for n, x in tensors().items()}


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def mutate(data: bytes, header: int, rng: np.random.Generator) -> bytes:
  """Returns the data with one kind of damage; 90% of it is in the header."""
  end = header if rng.random() < 0.9 else len(data)
  at, kind = int(rng.integers(end)), rng.integers(6)
  some = rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8).tobytes()
  if kind == 0:  # one bit
    return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
  if kind == 1:  # bytes replaced
    return data[:at] + some + data[at + len(some) :]
  if kind == 2:  # bytes inserted
    return data[:at] + some + data[at:]
  if kind == 3:  # bytes lost
    return data[:at] + data[at + len(some) :]
  if kind == 4:  # truncated
    return data[: int(rng.integers(len(data)))]
  other = int(rng.integers(end))  # a piece copied elsewhere
  return data[:at] + data[other : other + 16] + data[at + 16 :]


def read_all(weights, shapes: dict) -> None:
  for name in weights.names():
    x = weights.read(name)
    assert x.shape == weights.shape(name) and x.size == math.prod(x.shape)
    if name in shapes and weights.names() == shapes.keys():
      assert x.ndim == len(shapes[name])


def test_safetensors(tmp_path):
  path = write_folder(tmp_path, weights=SMALL) / "model.safetensors"
  whole, rng = path.read_bytes(), np.random.default_rng(0)
  header = 8 + int.from_bytes(whole[:8], "little")
  refused = 0
  for _ in range(2000):
    path.write_bytes(mutate(whole, header, rng))
    try:
      read_all(SafetensorsFolder(tmp_path), {n: x.shape for n, x in SMALL.items()})
    except InputError:
      refused += 1
  assert refused > 1000


def test_gguf(tmp_path):
  path, mesh = tmp_path / "x.gguf", one_device()
  write_gguf(path, quant="Q4_1")
  whole, rng, shapes = path.read_bytes(), np.random.default_rng(0), torch_shapes(CONFIG)
  header = whole.index(b"blk.3.ffn_down") + 60
  refused = 0
  for _ in range(300):
    path.write_bytes(mutate(whole, header, rng))
    try:
      opened = open_model(str(path))
      read_all(opened.weights, shapes)
      model = load.load_model(opened, mesh, layers.ComputeConfig())
      assert model.layers.up.shape == (4, 32, 64)
    except InputError:
      refused += 1
  assert refused > 150


def test_config_json(tmp_path):
  """Loads the model; a model that loads has the sizes in its config."""
  folder = write_folder(tmp_path)
  path, mesh = folder / "config.json", one_device()
  whole, rng = path.read_bytes(), np.random.default_rng(0)
  refused = 0
  for _ in range(200):
    path.write_bytes(mutate(whole, len(whole), rng))
    try:
      opened = open_model(str(folder))
      model = load.load_model(opened, mesh, layers.ComputeConfig())
      assert model.layers.up.shape == (4, 32, 64)
    except InputError:
      refused += 1
  assert refused > 100
