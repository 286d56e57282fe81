"""`record` with a teacher on servers."""

import numpy as np
import pytest
import scoring_server
import tiny
from scoring_server import Server

from distill_jax import config
from distill_jax.commands import record
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.records.store import open_store


def made(folder, *servers, **changes):
  """A config of a corpus of 20 rows of bytes, for a teacher on servers."""
  c = tiny.tiny(folder)
  c.teacher.source = ""
  c.records.kind, c.records.n, c.records.served = "topk", 5, True
  c.generate.server.urls = tuple(server.url for server in servers)
  c.generate.server.first_byte_s = c.generate.server.silence_s = 20.0
  c.generate.server.retries = 3
  encode = load_tokenizer(c.data.tokenizer).encode
  for server in servers:
    server.encode = server.encode or encode
  for name, value in changes.items():
    section = c.generate.server if hasattr(c.generate.server, name) else c.records
    setattr(section, name, value)
  return c


def run(c, folder):
  return record.run(config.resolve(c), folder)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_records_are_the_servers_distributions(tmp_path, kind):
  with Server(kind) as server:
    result = run(made(tmp_path, server), tmp_path / "w")
  store = open_store(tmp_path / "w")
  assert result["sequences"] == result["recorded_now"] == len(store) == 20
  m = store.manifest
  assert (m.kind, m.n, m.entropy, m.missing_mass) == ("topk", 5, False, "tail_bucket")
  assert m.teacher == {"name": "big", "digest": "unknown: behind a server"}
  row = store[7]
  for t in np.flatnonzero(row["mask_T"]):
    start = np.argmax(row["segments_T"] == row["segments_T"][t])
    want = scoring_server.logp(row["tokens_T"][start : t + 1])
    best = np.argsort(-want)[:5]
    assert row["argmax_T"][t] == best[0]
    assert set(row["ids_TK"][t]) == set(best)
    np.testing.assert_allclose(row["logp_TK"][t], want[row["ids_TK"][t]], rtol=1e-3)
    np.testing.assert_allclose(row["label_logp_T"][t], want[row["tokens_T"][t + 1]], rtol=1e-3)
