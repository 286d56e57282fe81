"""Models in S3 and GCS: what is read, by whom, and faults."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from local_stores import Proxy, free_port
from object_stores import upload
from tiny_checkpoints import CONFIG, tensors, write_folder

from distill_jax.errors import InputError
from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding
from distill_jax.runtime import files

HOW = layers.ComputeConfig()
WEIGHTS = "model.safetensors"


def loaded(source, mesh=None):
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  return load.load_model(open_model(str(source)), mesh, HOW)


def read_of_weights(proxy: Proxy) -> int:
  """Returns the bytes of safetensors that went through a proxy."""
  return sum(r.read_bytes for r in proxy.requests if WEIGHTS in r.path and r.method == "GET")


def check_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_weights_are_read_by_ranges_once(object_store, tmp_path):
  folder = write_folder(tmp_path / "m")
  url, proxy = upload(folder, object_store.url), object_store.proxy
  opened = open_model(url)
  assert opened.tokenizer.size() == 48 and opened.config == open_model(str(folder)).config
  assert read_of_weights(proxy) == 0
  size = (folder / WEIGHTS).stat().st_size
  model = load.load_model(opened, sharding.make_mesh(1, 2, 2), HOW)
  assert size - 100 < read_of_weights(proxy) <= size + 1000
  check_same(model, loaded(folder))
  assert open_model(url) is opened  # the headers are not read again


def test_the_digest_is_that_of_the_checksums_of_the_store(object_store, tmp_path):
  folder = write_folder(tmp_path / "m")
  url = upload(folder, object_store.url)
  digest = open_model(url).digest
  assert 0 < read_of_weights(object_store.proxy) < (folder / WEIGHTS).stat().st_size / 10
  assert len(digest) == 64
  assert open_model(upload(folder, f"{object_store.url}/again")).digest == digest
  data = bytearray((folder / WEIGHTS).read_bytes())
  data[-1] ^= 1
  files.write(f"{url}/{WEIGHTS}", bytes(data))
  assert open_model(url).digest != digest


def test_faults_that_pass_are_retried(object_store, tmp_path):
  folder = write_folder(tmp_path / "m")
  url = upload(folder, object_store.url)
  faults = [503, "reset", "reset_response"]
  object_store.proxy.fault = lambda method, path: faults.pop() if faults else None
  check_same(loaded(url), loaded(folder))
  assert not faults


def test_a_file_replaced_while_it_is_read_raises(object_store, tmp_path):
  url = upload(write_folder(tmp_path / "m"), object_store.url)
  opened = open_model(url)
  assert opened.weights.names()  # the headers are read
  other = write_folder(tmp_path / "other", weights=tensors(seed=1))
  files.upload(other / WEIGHTS, f"{url}/{WEIGHTS}")
  with pytest.raises(InputError, match=f"{WEIGHTS} has been replaced or deleted while"):
    load.load_model(opened, sharding.make_mesh(devices=jax.devices()[:1]), HOW)


def test_a_truncated_file_raises(object_store, tmp_path):
  folder = write_folder(tmp_path / "m")
  url = upload(folder, object_store.url)
  opened = open_model(url)
  assert opened.weights.names()
  data = (folder / WEIGHTS).read_bytes()
  files.write(f"{url}/{WEIGHTS}", data[: len(data) // 2])
  with pytest.raises(InputError, match=f"{WEIGHTS} ends before byte"):
    load.load_model(opened, sharding.make_mesh(devices=jax.devices()[:1]), HOW)
  with pytest.raises(InputError, match=f"{WEIGHTS} has .* bytes, but its tensors end at"):
    loaded(url)


def test_a_gguf_file_at_a_url_and_an_absent_model(object_store):
  files.write(f"{object_store.url}/x.gguf", b"GGUF")
  for name in ("x.gguf", "absent"):
    with pytest.raises(InputError, match=f"{name} is neither a Hugging Face folder nor"):
      open_model(f"{object_store.url}/{name}")


WORKER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
address, count, index, url, out = sys.argv[1:]
jax.distributed.initialize(address, int(count), int(index))
import numpy as np
from distill_jax.hub import load
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding
from distill_jax.runtime import distributed
for axis in ("data", "fsdp", "tensor"):
  mesh = sharding.make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, axis: 2})
  model = load.load_model(open_model(url), mesh, layers.ComputeConfig())
  values = {name: distributed.to_host(v[...]) for name, v in params.named_params(model)}
  if index == "0":
    np.savez(f"{out}/{axis}.npz", **values)
"""


def test_two_processes_read_half_each_and_get_the_same_values(gcs, tmp_path):
  """The three axes cross the processes in turn."""
  folder = write_folder(tmp_path / "m")
  url = upload(folder, gcs.url)
  address = f"localhost:{free_port()}"
  with Proxy(gcs.store.port) as first, Proxy(gcs.store.port) as second:
    proxies = (first, second)
    workers = [
      subprocess.Popen(
        [sys.executable, "-c", WORKER, address, "2", str(i), url, str(tmp_path)],
        env=os.environ | gcs.environment(proxy.port) | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
      )
      for i, proxy in enumerate(proxies)
    ]
    errors = [w.communicate(timeout=240)[1] for w in workers]
    assert not any(w.returncode for w in workers), errors
    size = (folder / WEIGHTS).stat().st_size
    header = 8 + int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")
    for proxy in proxies:
      # The headers are read once by each process, and the data three times for three meshes.
      assert read_of_weights(proxy) <= header + 1.01 * 3 * (size - header) / 2
  want = dict(params.named_params(loaded(folder)))
  for axis in ("data", "fsdp", "tensor"):
    got = np.load(tmp_path / f"{axis}.npz")
    assert set(got) == want.keys()
    for name, v in want.items():
      np.testing.assert_array_equal(got[name], np.asarray(v[...]))


def test_a_tied_head_is_compared_in_a_store(s3, tmp_path):
  tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
  w = tensors(tied)
  other = w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1}
  url = upload(write_folder(tmp_path / "m", tied, other), s3.url)
  with pytest.raises(InputError, match="differs from the embedding table"):
    loaded(url)
