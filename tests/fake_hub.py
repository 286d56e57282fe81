"""A server with the parts of the Hugging Face Hub's API that reading a model needs."""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(ThreadingHTTPServer):
  """A server of one repository, org/name, with the files of a folder; a context manager.

  Attributes:
    asked: The (method, path, Range header) of each request.
    status: The status of every response instead of the right one; 0: none.
    is_gated: Whether files, but not their list, need a token.
    signature: The number in valid addresses of weights; other addresses have expired.
  """

  daemon_threads = True

  def __init__(self, folder: Path):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.folder, self.status, self.signature, self.is_gated = folder, 0, 0, False
    self.asked: list[tuple[str, str, str | None]] = []

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}"

  def __enter__(self):
    threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
    return self

  def __exit__(self, *_):
    self.shutdown()
    self.server_close()

  def ranges(self) -> int:
    """Returns the bytes of safetensors that were asked for."""
    asked = [r for _, path, r in self.asked if r and path.startswith("/content/")]
    spans = [r.removeprefix("bytes=").split("-") for r in asked]
    return sum(int(last) - int(first) + 1 for first, last in spans)


def _entry(path: Path) -> dict:
  data = path.read_bytes()
  entry = {"type": "file", "path": path.name, "size": len(data), "oid": "0" * 40}
  if path.suffix == ".safetensors":
    sha256 = hashlib.sha256(data).hexdigest()
    entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
  return entry


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Hub

  def log_message(self, *_):
    pass

  def _answer(self):
    self.rfile.read(int(self.headers.get("Content-Length") or 0))
    path = urllib.parse.urlparse(self.path).path
    self.server.asked.append((self.command, path, self.headers.get("Range")))
    if self.server.status:
      return self._send(self.server.status, b"")
    api = "/api/models/org/name"
    if path.startswith(f"{api}/tree/"):
      return self._json([_entry(p) for p in sorted(self.server.folder.iterdir())])
    if path == api or path.startswith(f"{api}/revision/"):
      return self._json({"id": "org/name", "sha": COMMIT, "siblings": []})
    prefix = f"/org/name/resolve/{COMMIT}/"
    if path.startswith("/content/"):
      _, _, signature, name = path.split("/")
      file = self.server.folder / name
      if signature != str(self.server.signature) or "Authorization" in self.headers:
        return self._send(403, b"")
    else:
      file = self.server.folder / path.removeprefix(prefix)
      if self.server.is_gated:
        return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
      if not path.startswith(prefix) or not file.is_file():
        return self._send(404, b"")
      if file.suffix == ".safetensors":
        address = f"http://127.0.0.1:{self.server.server_address[1]}"
        address = address.replace("127.0.0.1", "localhost")  # another host than the Hub
        where = {"Location": f"{address}/content/{self.server.signature}/{file.name}"}
        return self._send(302, b"", where)
    data = file.read_bytes()
    if not (span := self.headers.get("Range")):
      return self._send(200, data)
    first, last = span.removeprefix("bytes=").split("-")
    return self._send(206, data[int(first) : int(last) + 1])

  do_GET = do_HEAD = do_POST = _answer  # noqa: N815

  def _json(self, value):
    self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

  def _send(self, status, data, headers=None):
    with contextlib.suppress(OSError):
      self.send_response(status)
      for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(data)
