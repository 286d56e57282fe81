"""Checks of the options of servers, before any request."""

from __future__ import annotations

from distill_jax.errors import InputError, bad_value
from distill_jax.generation.options import ServerOptions
from distill_jax.runtime import extras

with extras.needed("serve"):
  import httpx2


def check(server: ServerOptions) -> None:
  """Raises InputError if an option is out of range, or an address is invalid or named twice."""
  s = server
  for name, value, minimum in (
    ("in_flight", s.in_flight, 1),
    ("silence_s", s.silence_s, 1e-3),
    ("first_byte_s", s.first_byte_s, 1e-3),
    ("timeout_s", s.timeout_s, 0),
    ("retries", s.retries, 0),
    ("top_logprobs", s.top_logprobs, 0),
    ("requests_per_minute", s.requests_per_minute, 0),
    ("max_disagreement", s.max_disagreement, 0),
  ):
    if not value >= minimum:
      raise bad_value(f"generate.server.{name}", value, f"at least {minimum}", "Increase it")
  if not all(map(_is_address, s.urls)):  # no URL in the message, since it may have a password
    raise InputError(
      "generate.server.urls is invalid; expected addresses like http://localhost:8000/v1. Set the "
      "key with generate.server.api_key_env."
    )
  if len({url.rstrip("/") for url in s.urls}) < len(s.urls):
    raise bad_value("generate.server.urls", s.urls, "different addresses", "Remove one of them")


def _is_address(url: str) -> bool:
  try:
    parsed = httpx2.URL(url)
  except httpx2.InvalidURL:
    return False
  return parsed.scheme in ("http", "https") and bool(parsed.host) and not parsed.userinfo
