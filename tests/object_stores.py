"""Fixtures: real S3 and GCS servers on this machine, behind a proxy that counts and fails requests.

def test_it(s3): files.write(f"{s3.url}/x", b"..."); assert s3.proxy.written_bytes == 3

`upload` and `contents` copy and read a folder at any URL.
"""

import contextlib
import dataclasses
import itertools

import pytest
from local_stores import Proxy, Store

_NUMBERS = itertools.count()


@dataclasses.dataclass
class ObjectStore:
  """A store in which a test has a folder of its own.

  Attributes:
    store: The server.
    proxy: The proxy through which this process reaches it.
    url: The URL of the test's folder, e.g. s3://bucket/7.
  """

  store: Store
  proxy: Proxy
  url: str

  def environment(self, port=None):
    """The environment of a process that uses the store through the test's proxy, or at a port."""
    return self.store.environment(port or self.proxy.port)


def upload(folder, url):
  """Uploads the files of a local folder that are not hidden; returns the URL."""
  from distill_jax.runtime import files

  for path in folder.iterdir():
    if path.is_file() and not path.name.startswith("."):
      files.upload(path, files.join(url, path.name))
  return url


def contents(url):
  """Returns the bytes of the files of a folder, by name."""
  from distill_jax.runtime import files

  return {name: files.read(files.join(url, name)) for name in files.listing(url)}


@pytest.fixture(scope="session")
def s3_server():
  with Store("s3") as store:
    yield store


@pytest.fixture(scope="session")
def gcs_server():
  with Store("gs") as store:
    yield store


@contextlib.contextmanager
def _object_store(store, monkeypatch):
  import fsspec

  from distill_jax.runtime import remote_files, retries

  with Proxy(store.port) as proxy:
    for name, value in store.environment(proxy.port).items():
      monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, store.kind, store.options(proxy.port))
    monkeypatch.setattr(retries, "RETRY_SECONDS", 20.0)
    remote_files.forget()
    yield ObjectStore(store, proxy, f"{store.url}/{next(_NUMBERS)}")
    remote_files.forget()


@pytest.fixture
def s3(s3_server, monkeypatch):
  with _object_store(s3_server, monkeypatch) as found:
    yield found


@pytest.fixture
def gcs(gcs_server, monkeypatch):
  with _object_store(gcs_server, monkeypatch) as found:
    yield found


@pytest.fixture(params=["s3", "gcs"])
def object_store(request):
  """Runs a test on S3, then on GCS."""
  return request.getfixturevalue(request.param)
