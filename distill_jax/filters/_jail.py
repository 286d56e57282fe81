"""Runs one program where it can do no harm; a script, on Linux.

Its argument is a JSON object: the fields of code.Filter, `folder`, and `fds`, which the runner
reads its job from and writes its report to. Two processes: the outer one makes the namespaces
and waits; the inner one is the first of its own world of processes, so that all it starts end
with it. There it has no network, sees all files read-only but an empty folder in memory, loses
every privilege but root's to read, and becomes the program. The outer one exits with 125 where
that cannot be done, 124 where the time to compute was used up, 1 where the program was killed
otherwise.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

CLONE = {"NEWNS": 0x20000, "NEWIPC": 0x8000000, "NEWUSER": 0x10000000, "NEWPID": 0x20000000,
         "NEWNET": 0x40000000}  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID = 442, -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 38, 47
CAP_VERSION, CAP_DAC_READ_SEARCH = 0x20080522, 2
COVERED = ("/proc", "/run")  # other processes, and the sockets of services
NOBODY = 65534

RUNNER = """
import json, os, sys
def main(read, write, run, compile, tell, leave):
  with os.fdopen(read) as f:
    secret, source, test, entry = json.load(f)
  try:
    names = {"__name__": "sample"}
    try:
      source, test = compile(source, "sample.py", "exec"), compile(test, "test.py", "exec")
    except (SyntaxError, ValueError) as e:
      report = "unparsed " + str(e)[:200]
    else:
      run(source, names)
      if entry not in names:
        report = "undefined " + entry
      else:
        run(test, names)
        names["check"](names[entry])
        report = secret
  except AssertionError:
    report = "asserted"
  except (SystemExit, KeyboardInterrupt):
    report = "exited"
  except BaseException as e:
    report = "raised " + type(e).__name__
  tell(write, report.encode("utf-8", "replace"))
  leave(0)
main(int(sys.argv[1]), int(sys.argv[2]), exec, compile, os.write, os._exit)
"""

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
  """A function of the C library that returns 0."""
  if getattr(libc, name)(*args):
    code = ctypes.get_errno()
    raise OSError(code, f"{name}: {os.strerror(code)}")


def with_parent():
  """Ends this process when its parent ends."""
  parent = os.getppid()
  call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  if parent != os.getppid():
    sys.exit(1)


def is_root():
  """Root of the machine, who may become any user."""
  whole = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
  return os.geteuid() == 0 and whole


def leave_the_world(root):
  """New namespaces: of this process, and of processes for its children."""
  user, group = os.geteuid(), os.getegid()
  flags = sum(flag for name, flag in CLONE.items() if not (root and name == "NEWUSER"))
  call("unshare", flags)
  if not root:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"),
                       ("gid_map", f"{NOBODY} {group} 1")):  # fmt: skip
      Path(f"/proc/self/{name}").write_text(text)


def mount(target, options, flags):
  call("mount", b"none", os.fsencode(target), b"tmpfs", flags | MS_NOSUID | MS_NODEV, options)


def close_the_files(folder, disk):
  call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
  attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
  syscall = [ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, b"/", AT_RECURSIVE, attributes, 32]
  call("syscall", *syscall)
  for path in COVERED:
    if Path(path).is_dir():
      mount(path, b"size=4k,mode=0555", MS_RDONLY | MS_NOEXEC)
  mount(folder, f"size={disk},nr_inodes=1000,mode=0777".encode(), 0)


def limit(job, extra):
  """Limits of each process; `extra` processes are there beside the program's."""
  both = lambda name, value: resource.setrlimit(getattr(resource, name), (value, value))
  both("RLIMIT_CPU", job["cpu_seconds"])
  both("RLIMIT_AS", job["memory"])
  both("RLIMIT_FSIZE", job["disk"])
  both("RLIMIT_CORE", 0)
  both("RLIMIT_NOFILE", 64)
  if job["isolated"]:
    both("RLIMIT_NPROC", job["processes"] + extra)


def turn_into(user):
  """From root to a user of its own, since processes are counted by user, and root's are not.

  It may still read what root may, as Python itself can lie where only root reads.
  """
  call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
  os.setgroups([])
  os.setresgid(user, user, user)
  os.setresuid(user, user, user)
  bit = 1 << CAP_DAC_READ_SEARCH
  call("capset", (ctypes.c_uint32 * 2)(CAP_VERSION, 0), (ctypes.c_uint32 * 6)(bit, bit, bit))
  call("prctl", PR_CAP_AMBIENT, 2, CAP_DAC_READ_SEARCH, 0, 0)  # 2: raise, so that exec keeps it


def become(job, root):
  """The inner process, up to the program."""
  if job["isolated"]:
    close_the_files(job["folder"], job["disk"])
  os.chdir(job["folder"])
  null = os.open("/dev/null", os.O_RDWR)
  os.dup2(null, 1)
  os.dup2(null, 2)
  limit(job, 0 if root else 1)
  if job["isolated"] and root:
    turn_into(2**30 + job["number"])
  call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user has undone it
  arguments = [job["python"], "-I", "-B", "-c", RUNNER, *map(str, job["fds"])]
  os.execve(job["python"], arguments, dict(os.environ, HOME=job["folder"]))


def main(job):
  with_parent()
  root = is_root()
  job["number"] = os.getpid()
  heard, told = os.pipe()  # closed by exec: the program cannot speak here
  try:
    if job["isolated"]:
      leave_the_world(root)
    inner = os.fork()
  except OSError as e:
    fail(e)
  if not inner:
    os.close(heard)
    try:
      become(job, root)
    except (OSError, ValueError) as e:
      os.write(told, str(e).encode())
    os._exit(1)
  os.close(told)
  for fd in job["fds"]:
    os.close(fd)
  _, status, used = os.wait4(inner, 0)
  if why := os.read(heard, 1000):
    fail(why.decode())
  if os.WIFSIGNALED(status):
    sys.exit(124 if used.ru_utime + used.ru_stime > job["cpu_seconds"] - 0.2 else 1)


def fail(why):
  print(why, file=sys.stderr)
  sys.exit(125)


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
