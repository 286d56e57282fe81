"""`retarget` from a URL to a URL, with a store that fails now and then."""

import itertools

import object_stores
import pytest
import retarget_runs
from retarget_runs import ROWS, made, run, stores

from distill_jax.errors import Preempted
from distill_jax.runtime import distributed, files, storage


@pytest.mark.slow
def test_a_store_at_a_url_is_converted_at_a_url(object_store, tmp_path, monkeypatch):
  """Slices, a stop and two processes make the bytes of a local run; the disk holds no shard."""
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  source = retarget_runs.write_source(tmp_path / "source")
  run(made(source), tmp_path / "done")
  url, target = f"{object_store.url}/records", f"{object_store.url}/retargeted"
  object_stores.upload(source / "records", url)
  object_stores.upload(source / "records" / "heldout", f"{url}/heldout")
  numbers = itertools.count()
  object_store.proxy.fault = lambda method, path: None if next(numbers) % 11 else 503

  def converted(part, **options):
    with storage.Synced(target, part) as folder:
      result = run(made(source, records=url, **options), folder)
      assert not list(folder.rglob("*records-*"))
      return result

  assert converted("-1-2", slice="1/2")["retargeted_now"] == 8
  with monkeypatch.context() as stopping:
    seen = iter([False, True])
    stopping.setattr(distributed.Preemption, "reached", lambda self: next(seen))
    with pytest.raises(Preempted):
      converted("")
  assert "retarget.json" not in files.listing(target)
  assert converted("", workers=2)["sequences"] == ROWS
  for name, want in stores(tmp_path / "done").items():
    found = object_stores.contents(target if name == "." else f"{target}/{name}")
    assert {k: v for k, v in found.items() if k in want} == want
