"""Programs in the sandbox: only their return values count, and they cannot do harm."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_samples import a_sample, judge, kinds

from distill_jax.errors import InputError
from distill_jax.filters import _runner, code
from distill_jax.filters.samples import Unjudgeable

TEST = "def check(f):\n  assert f(2) == 4\n  assert f(3) == 9"
LIMITS = {"cpu_seconds": 1, "wall_seconds": 60.0, "memory": 2**29}
EVIL = Path("/tmp/distill-jax-test-evil")
# LOOK searches the program's interpreter for the secret; GRAB tries to copy other processes' files.
LOOK = """import gc, os, sys
  held, frame = [], sys._getframe()
  while frame:
    held += [*frame.f_locals.values(), *frame.f_globals.values()]
    frame = frame.f_back
  for o in gc.get_objects():
    held += o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ()
  secret = lambda o: isinstance(o, str) and len(o) == 32 and set(o) <= set("0123456789abcdef")
  return x * x * any(map(secret, held))"""
GRAB = """import ctypes, os
  call, got = ctypes.CDLL(None).syscall, []
  for pid in {1, os.getppid()}:
    other = call(434, pid, 0)
    got += [call(438, other, fd, 0) for fd in range(16)]
  return x * x * (max(got) >= 0)"""  # pidfd_open, pidfd_getfd
PROGRAMS = {  # body of f: the reason why it is rejected
  "return x * x": None,
  "return x + 2": "failed the test",
  "while True: pass": "timeout",
  "return len(bytearray(8 << 30))": "raised",
  "import sys; sys.exit(0)": "exited before the test finished",
  "import os; os._exit(0)": "exited before the test finished",
  "print('ok', 'passed', 1.0); return 0": "failed the test",
  "import socket; socket.create_connection(('127.0.0.1', PORT), 2); return x * x": "raised",
  f"open({str(EVIL)!r}, 'w').write('x'); return x * x": "raised",
  f"import os; os.remove({__file__!r}); return x * x": "raised",
  "open('a', 'w').write('x'); return x * x * len(open('a').read())": None,
  "open('a', 'w').write('x' * (1 << 26)); return x * x": "raised",
  "import os\n  while os.fork() or True: pass": "raised",
  "import os; os.fork() or (os.setsid(), __import__('time').sleep(60)); return x * x": None,
  "import os; os.kill(-1, 9); return x * x": "raised",
  "import os; return x * x + len(os.listdir('/proc'))": "raised",
  "return f(x)": "raised",
  "import ctypes; ctypes.string_at(0)": "killed",
  "import os; [os.write(fd, b'x' * 40000) for fd in range(3, 9)]; return 0": "raised",
  "return type('E', (int,), {'__eq__': lambda *a: True})(0)": "failed the test",
  "return object()": "returned a value that is not plain",
  "import socket; socket.socket(socket.AF_UNIX).connect('SOCKET'); return x * x": "raised",
  "open('/dev/zero', 'rb').read(1); return x * x": "raised",
  "open('/dev/null', 'w').write('x'); return x * x": None,
  "assert __import__('ctypes').CDLL(None).shmget(1, 1 << 20, 0o1666) >= 0": "failed the test",
  LOOK: "failed the test",
  GRAB: "failed the test",
}


def namespaces():
  return subprocess.run(["unshare", "-n", "-r", "true"], capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
  not (sys.platform == "linux" and namespaces()), reason="this machine permits no namespaces"
)


@pytest.fixture(scope="module")
def port():
  """Yields the port of a local server, which can be reached outside the sandbox."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    number = server.getsockname()[1]
    socket.create_connection(("127.0.0.1", number), 2).close()
    yield number


@pytest.fixture
def socket_file():
  """Yields the path of a Unix socket that any process may connect to."""
  with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
    Path(folder).chmod(0o755)
    path = Path(folder) / "s"
    listening.bind(str(path))
    path.chmod(0o777)
    listening.listen()
    yield str(path)


@needs_namespaces
def test_programs_cannot_do_harm(port, socket_file):
  samples = [
    a_sample(
      "def f(x):\n  " + body.replace("PORT", str(port)).replace("SOCKET", socket_file),
      prompt="",
      test=TEST,
      entry_point="f",
      sample=i,
    )
    for i, body in enumerate(PROGRAMS)
  ]
  got = dict(zip(PROGRAMS, kinds("code", samples, **LIMITS), strict=True))
  assert got == PROGRAMS
  assert not EVIL.exists() and Path(__file__).exists()
  asleep = code.Filter(wall_seconds=1.0).run("__import__('time').sleep(600)", TEST, "f")
  assert asleep == "timeout: 1.0 s of wall-clock time"
  mine = [p for p in Path("/proc").glob("[0-9]*/stat") if _parent(p) == os.getpid()]
  assert not [p for p in mine if b"_jail" in (p.parent / "cmdline").read_bytes()]


def _parent(stat):
  try:
    return int(stat.read_text().rpartition(")")[2].split()[1])
  except FileNotFoundError:
    return -1


def read_by_a_program(body, python=sys.executable):
  """Returns what a program's function f returns, as text."""
  test = "def check(f):\n  raise type(str(f()), (Exception,), {})"
  reason = code.Filter(**LIMITS, python=python).run(f"def f():\n  {body}", test, "f")
  return reason.removeprefix("raised: ")


@needs_namespaces
def test_a_program_reads_no_file_of_this_machine_even_if_root_starts_it(tmp_path, monkeypatch):
  """Not those of root, of another user, of the system, and not the environment of its parents."""
  monkeypatch.setenv("HF_TOKEN", "secret-of-the-environment")
  secret, readable = tmp_path / "secret", tmp_path / "readable"
  for path, mode in ((secret, 0o600), (readable, 0o666)):
    path.write_text("secret")
    path.chmod(mode)
  home = Path("~").expanduser() / ".distill-jax-test-secret"
  home.write_text("secret")
  paths = [secret, readable, home, "/etc/shadow", "/etc/passwd", "/proc/1/environ", __file__]
  try:
    for path in paths:
      assert read_by_a_program(f"return open({str(path)!r}).read()") == "FileNotFoundError", path
  finally:
    home.unlink()
  assert "secret" not in read_by_a_program("import os; return dict(os.environ)")
  listed = read_by_a_program("import os; return sorted(os.listdir('/tmp'))")
  names = {path.name for path in Path("/tmp").iterdir()}
  assert {name for name in names if f"'{name}'" in listed} == names & {*sys.prefix.split("/")}
  assert int(read_by_a_program("import os; return os.getuid()")) > 2**15
  for call in ("os.setuid(0)", "os.chroot('/usr')", "os.mknod('x', 0o20666, 259)"):
    assert read_by_a_program(f"import os; return {call}") == "PermissionError"


@needs_namespaces
def test_a_python_behind_links_in_a_closed_folder_runs(tmp_path):
  closed = tmp_path / "closed"
  venv.create(closed / "real", symlinks=True)
  (closed / "link").symlink_to("real")
  closed.chmod(0o700)
  python = str(closed / "link/bin/python")
  assert read_by_a_program("import sys; return sys.prefix", python) == str(closed / "link")
  with pytest.raises(InputError, match="python is '/no/python'; expected a Python interpreter"):
    code.Filter(python="/no/python").run("", TEST, "f")


@needs_namespaces
def test_programs_as_models_write_them():
  begin = "from typing import List\n\n\ndef f(x: int) -> int:\n  '''Squares.'''\n"
  good = "def f(x: List) -> int:\n  return x * x"
  texts = {
    "  return x * x": None,
    f"<think>def f(x): no</think>Here:\n```python\n{good}\n```\nIt squares.": None,
    f"```python\n{good}\n```\nUse it:\n```python\nprint(f(2))\n```": None,
    "```\ndef g(x): return 1\n```": "failed the test",
    "  return x *": "not Python",
    "  return (": "not Python",
    "  return x * x\ndef check(f): pass\nraise SystemExit": "exited before the test finished",
    "  pass\nimport builtins\nbuiltins.exec = lambda *a: None\n": "failed the test",
    "  '''": "not Python",
  }
  samples = [a_sample(t, prompt=begin, test=TEST, entry_point="f") for t in texts]
  whys = kinds("code", samples, **LIMITS)
  assert dict(zip(texts, whys, strict=True)) == texts
  both = begin + '  return x * x\n\n\ndef g(x):\n  "Of f."\n'
  uses = "def check(g):\n  assert [g(x) for x in (1, 3)] == [f(f(x)) for x in (1, 3)]"
  sample = a_sample("  return f(f(x))", prompt=both, entry_point="g", test=uses)
  assert kinds("code", [sample], **LIMITS) == [None]  # the test uses the prompt's function f
  chat = a_sample(
    f"```python\n{good.replace('List', 'int')}\n```",
    test=TEST,
    entry_point="f",
    prompt=[{"role": "user", "content": "Square."}],
  )
  assert kinds("code", [chat], **LIMITS) == [None]
  about = {"prompt": begin, "test": TEST, "entry_point": "f"}  # as if with a template
  sample = a_sample(f"```\n{good}\n```", prompt=f"Complete this:\n{begin}", about=about)
  assert kinds("code", [sample], **LIMITS) == [None]
  for broken in ({"test": "def ("}, {"entry_point": "f("}, {"entry_point": None}):
    fields = {"test": TEST, "entry_point": "f"} | broken
    assert isinstance(judge("code", [a_sample(prompt="", **fields)], **LIMITS)[0], Unjudgeable)


SQUARE = "def f(x):\n  return x * x\n"
FENCES = 'def f(x):\n  """\n  ```\n  f(2)\n  ```\n  """\n  return x * x\n'


@pytest.mark.parametrize(
  ("text", "want"),
  [
    (f"```python\n{SQUARE}```", SQUARE),
    (f"Install:\n```bash\npip install x\n```\n```python\n{SQUARE}```\nDone.", SQUARE),
    (f"```python3\n{SQUARE}```\nIt squares.", SQUARE),
    (f"```py title=f\n{SQUARE}```\n```text\n4\n```", SQUARE),
    (f"```Python\n{SQUARE}```\nDone.".replace("\n", "\r\n"), SQUARE),
    ("1. Code:\n   ```python\n   def f(x):\n     return x * x\n   ```\n2. Run it.", SQUARE),
    (f"~~~\n{SQUARE}~~~\n", SQUARE),
    (f"Here it is: ```python\n{SQUARE}```\nDone.", SQUARE),
    (f"```python\n{FENCES}```\nIt squares.", FENCES),
    (f"```python\n{SQUARE.rstrip()}```", SQUARE.rstrip()),
    (f"Use `f`: ```x```\n```\n{SQUARE}", SQUARE.rstrip()),
    ("```bash\npip install x\n```", "```bash\npip install x\n```"),
  ],
)
def test_the_code_of_an_answer(text, want):
  assert code.program(None, text, "f").removeprefix("\n") == want


def test_future_imports_are_put_before_the_prompt():
  prompt = "import math\n\n\ndef f(x: int) -> int:\n  '''Squares.'''\n"
  text = f"```python\nfrom __future__ import annotations\n\n{SQUARE}```"
  values = {}
  exec(code.program(prompt, text, "f"), values)
  assert values["f"](3) == 9 and "math" in values


@needs_namespaces
def test_the_sandbox_of_a_user_who_is_not_root(tmp_path):
  """In a user namespace (`unshare -r`), root has no privileges outside of it."""
  bodies = [
    "return x * x",
    f"open({str(tmp_path / 'x')!r}, 'w'); return x * x",
    "import os; os.kill(-1, 9); return x * x",
  ]
  code = (
    "import sys; from distill_jax.filters.code import Filter\n"
    f"for body in {bodies!r}:\n"
    f"  print(Filter(wall_seconds=5.0).run('def f(x): ' + body, {TEST!r}, 'f'))"
  )
  done = subprocess.run(
    ["unshare", "-r", sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=Path(__file__).parents[2],
  )
  assert done.stdout.split("\n")[:3] == [
    "None",
    "raised: FileNotFoundError",
    "raised: ProcessLookupError",
  ], done.stderr
  assert not (tmp_path / "x").exists()


def test_a_machine_without_namespaces_is_refused(tmp_path, monkeypatch):
  jail = tmp_path / "jail.py"
  denied = "raise OSError(1, 'unshare: Operation not permitted')"
  jail.write_text(code.JAIL.read_text().replace('  call("unshare", flags)', f"  {denied}"))
  monkeypatch.setattr(code, "JAIL", jail)
  sample = a_sample("def f(x): return x * x", prompt="", test=TEST, entry_point="f")
  with pytest.raises(InputError, match="sandbox cannot be created .*isolated=False"):
    judge("code", [sample])
  assert kinds("code", [sample], isolated=False) == [None]


def test_plain_values_are_unchanged_by_encode_and_decode():
  values = [
    None,
    True,
    1,
    -(2**80),
    0.1,
    float("inf"),
    "ü\ud800",
    b"\x00",
    1j,
    [],
    (1, [2, (3,)]),
    {1, 2},
    frozenset("ab"),
    {(1, 2): {"a": None}, "dict": 1},
  ]
  for value in values:
    got = _runner.decode(json.loads(json.dumps(_runner.encode(value))))
    assert got == value and type(got) is type(value)
  assert _runner.encode([np.float64(0.5), np.arange(2), Counter("a")]) == _runner.encode(
    [0.5, [0, 1], {"a": 1}]
  )
