"""Tests of servers that fail wait a short time before they try again."""

import pytest

from distill_jax.generation import http_client, servers


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
  monkeypatch.setattr(http_client, "FIRST_WAIT_S", 0.02)
  monkeypatch.setattr(servers, "FIRST_WAIT_S", 0.02)
