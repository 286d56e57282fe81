"""Ranges of bytes of files on the Hugging Face Hub.

The Hub answers a request for a file with a temporary address of its content, and limits the number
of these requests to a few thousand in five minutes. Loading a large model on a pod takes ten times
as many ranges. The address of a file is therefore requested once per process, and again after it
has expired.
"""

from __future__ import annotations

import threading
from typing import Any

from distill_jax.runtime import extras

TIMEOUT = 60.0  # seconds without a byte
EXPIRED = (401, 403)  # statuses of an address that is no longer valid

_addresses: dict[str, str] = {}
_lock = threading.Lock()


def read(fs: Any, name: str, start: int, stop: int) -> bytes:
  """Returns bytes of a file.

  Args:
    fs: the file system of huggingface_hub.
    name: the name of the file in it, with the revision.
    start: the first byte.
    stop: the byte after the last.
  """
  with extras.needed("train"):
    from huggingface_hub.utils import get_session, hf_raise_for_status

  url = fs.url(name)
  for first_try in (True, False):
    address = _address(fs, url)
    headers = {"Range": f"bytes={start}-{stop - 1}"}
    if address.startswith(fs.endpoint):  # the token is for the Hub alone
      headers |= fs._api._build_hf_headers()
    response = get_session().get(address, headers=headers, timeout=TIMEOUT)
    if first_try and response.status_code in EXPIRED:
      forget(url, address)
    else:
      break
  hf_raise_for_status(response)
  return response.content


def forget(url: str, address: str) -> None:
  """Forgets the address of a file, unless another thread has renewed it."""
  with _lock:
    if _addresses.get(url) == address:
      del _addresses[url]


def _address(fs: Any, url: str) -> str:
  """Returns the address of the content of a file."""
  with extras.needed("train"):
    from huggingface_hub import get_hf_file_metadata

  with _lock:  # other threads wait for the address instead of requesting it, too
    if url not in _addresses:
      _addresses[url] = get_hf_file_metadata(url, token=fs.token, endpoint=fs.endpoint).location
    return _addresses[url]
