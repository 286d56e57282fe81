"""Servers that fail are tried again after a short time, and caches of 40 slots have 3 blocks."""

import pytest

from distill_jax.generation import servers
from distill_jax.nn import kv_cache


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
  monkeypatch.setattr(servers, "FIRST_WAIT_S", 0.02)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(kv_cache, "BLOCK", 16)
