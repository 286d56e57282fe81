"""Tests of servers that fail wait a short time before they try again."""

import pytest

from distill_jax.generation import servers


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
  monkeypatch.setattr(servers, "FIRST_WAIT_S", 0.01)
