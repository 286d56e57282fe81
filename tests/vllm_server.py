"""A real vLLM server.

It needs a vLLM of its own, because its packages do not fit those of this project: set VLLM to the
path of its command, e.g. VLLM=/opt/vllm/bin/vllm. On 2 CPU cores, the server starts in 2 minutes.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

import httpx2
import pytest

COMMAND = os.environ.get("VLLM", "")
needed = pytest.mark.skipif(not COMMAND, reason="set VLLM to the path of vLLM's command")
START_S = 900.0
ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def serving(folder, name: str, dtype: str, *options: str):
  """Serves a Hugging Face folder; yields the address for the OpenAI API."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [COMMAND, "serve", str(folder), "--served-model-name", name, "--dtype", dtype]
  command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *options]
  with tempfile.TemporaryDirectory() as logs:
    file = pathlib.Path(logs) / "log.txt"
    with file.open("w") as log:
      server = subprocess.Popen(
        command, env=os.environ | ENVIRON, stdout=log, stderr=log, start_new_session=True
      )
    try:
      _wait_until_ready(server, f"http://127.0.0.1:{port}/health", file)
      yield f"http://127.0.0.1:{port}/v1"
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
      try:
        server.wait(60)
      except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)


def _wait_until_ready(server: subprocess.Popen, address: str, file: pathlib.Path):
  end = time.monotonic() + START_S
  while time.monotonic() < end and server.poll() is None:
    with contextlib.suppress(httpx2.HTTPError):
      if httpx2.get(address, timeout=5).status_code == 200:
        return
    time.sleep(2)
  raise AssertionError(f"vLLM did not start:\n{file.read_text()[-3000:]}")
