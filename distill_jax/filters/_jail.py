"""Runs one program where it can do no harm; a script, on Linux.

Its argument is a JSON object: the fields of code.Filter; `folder`; `runner`, the source of the
program; and `fds`, which that reads its job from and writes its report to. Two processes: the
outer one makes the namespaces and waits; the inner one is the first of its own world of
processes, so that all it starts end with it. There it has no network and no device, sees all
files read-only but an empty folder in memory, may not call what would get it around that, loses
every privilege but root's to read, and becomes the program. The outer one exits with 125 where
that cannot be done, 124 where the time to compute was used up, 1 where the program was killed
otherwise.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

CLONE = {
  "NEWNS": 0x20000,
  "NEWIPC": 0x8000000,
  "NEWUSER": 0x10000000,
  "NEWPID": 0x20000000,
  "NEWNET": 0x40000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
MS_BIND = 0x1000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 38, 47
PR_SET_SECCOMP, AF_UNIX, EACCES, IO_URING_SETUP = 22, 1, 13, 425
ARCHITECTURES = {"x86_64": (0xC000003E, 41, 29), "aarch64": (0xC00000B7, 198, 194)}  # and the
# numbers of socket and shmget there
CAP_VERSION, CAP_DAC_READ_SEARCH = 0x20080522, 2
COVERED = ("/proc", "/run")  # other processes, and the sockets of services
DEVICES = ("/dev/null", "/dev/urandom")  # those that stay
NOBODY = 65534

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
    for name, text in (
      ("setgroups", "deny"),
      ("uid_map", f"{NOBODY} {user} 1"),
      ("gid_map", f"{NOBODY} {group} 1"),
    ):
      Path(f"/proc/self/{name}").write_text(text)


def mount(target, options, flags):
  call("mount", b"none", os.fsencode(target), b"tmpfs", flags | MS_NOSUID | MS_NODEV, options)


def set_mount(path, flags, attributes, cleared=0):
  what = (ctypes.c_uint64 * 4)(attributes, cleared, 0, 0)
  call("syscall", ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, path.encode(), flags, what, 32)


def close_the_files(folder, disk):
  call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
  for path in DEVICES:
    call("mount", path.encode(), path.encode(), None, MS_BIND, None)
  set_mount("/", AT_RECURSIVE, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
  for path in DEVICES:
    set_mount(path, 0, 0, ATTR_NODEV)
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


def forbid():
  """Sockets that files name, memory that no limit counts, and io_uring, which asks for no call.

  A filter of system calls, for good (seccomp(2)): offsets are those of struct seccomp_data.
  """
  if platform.machine() not in ARCHITECTURES:
    raise OSError(f"no filter of system calls is known for {platform.machine()}")
  architecture, socket, shmget = ARCHITECTURES[platform.machine()]
  load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06
  kill, allow, deny = 0x80000000, 0x7FFF0000, 0x50000 | EACCES
  program = [
    (load, 0, 0, 4),
    (equal, 1, 0, architecture),
    (leave, 0, 0, kill),
    (load, 0, 0, 0),
    (at_least, 0, 1, 0x40000000),
    (leave, 0, 0, kill),  # x32, another numbering
    (equal, 0, 1, IO_URING_SETUP),
    (leave, 0, 0, deny),
    (equal, 0, 1, shmget),
    (leave, 0, 0, deny),
    (equal, 0, 3, socket),
    (load, 0, 0, 16),
    (equal, 0, 1, AF_UNIX),
    (leave, 0, 0, deny),
    (leave, 0, 0, allow),
  ]
  code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
  where = ctypes.create_string_buffer(code, len(code))
  call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(program), ctypes.addressof(where)), 0, 0)


def become(job, root):
  """The inner process, up to the program."""
  if job["isolated"]:
    close_the_files(job["folder"], job["disk"])
  os.chdir(job["folder"])
  null = os.open("/dev/null", os.O_RDWR)
  os.dup2(null, 1)
  os.dup2(null, 2)
  limit(job, 1 if root else 2)
  if job["isolated"] and root:
    turn_into(2**30 + job["number"])
  call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  if job["isolated"]:
    forbid()
  call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user has undone it
  arguments = [job["python"], "-I", "-B", "-c", job["runner"], *map(str, job["fds"])]
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
