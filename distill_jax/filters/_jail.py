"""A script for Linux that runs one program in a sandbox.

Its argument is a JSON object with the fields of code.Filter and:
  folder: The working folder of the program.
  python, visible: The interpreter, and the paths that the program may read; see code.visible.
  links: Symbolic links that it needs outside of these folders, as pairs (path, target).
  runner: The source of the program, which is _runner.py.
  fds: Two file descriptors. The program reads its job from the first and writes its report to the
    second.

The script has two processes. The outer process creates the namespaces and waits. The inner process
is PID 1 of a new PID namespace, so killing it kills every descendant. It has no network, a seccomp
filter, no capabilities, and its own file system: a tmpfs with the folder of the program,
DEVICES, and what `visible` names, read-only. So it sees no files of other users, not even their
names, whoever starts the script. Then it execs the program.

The outer process exits with 125 if the sandbox cannot be created, 124 if the program exceeded its
CPU time, and 1 if the program was killed for another reason.
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
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 0x40000
MS_BIND, MNT_DETACH = 0x1000, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
PR_SET_SECCOMP, AF_UNIX, EACCES, IO_URING_SETUP = 22, 1, 13, 425
# Machine: (AUDIT_ARCH, number of the system call socket, number of the system call shmget).
ARCHITECTURES = {"x86_64": (0xC000003E, 41, 29), "aarch64": (0xC00000B7, 198, 194)}
DEVICES = ("/dev/null", "/dev/urandom")  # the only devices that can be opened
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
  """Calls a function of the C library and raises OSError if it does not return 0."""
  if getattr(libc, name)(*args):
    code = ctypes.get_errno()
    raise OSError(code, f"{name}: {os.strerror(code)}")


def end_with_parent():
  """Makes the kernel kill this process when its parent ends."""
  parent = os.getppid()
  call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  if parent != os.getppid():
    sys.exit(1)


def is_root():
  """Returns True if this process is root of the machine, and not of a user namespace only."""
  maps_all_users = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
  return os.geteuid() == 0 and maps_all_users


def enter_namespaces(root):
  """Moves this process into new namespaces and its future children into a new PID namespace."""
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


def mount_tmpfs(target, options):
  """Mounts an empty tmpfs on a folder."""
  call("mount", b"none", os.fsencode(target), b"tmpfs", MS_NOSUID | MS_NODEV, options)


def set_mount(path, flags, attributes, cleared=0):
  """Sets and clears attributes of a mount with mount_setattr(2)."""
  mount_attr = (ctypes.c_uint64 * 4)(attributes, cleared, 0, 0)
  call("syscall", ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, path.encode(), flags, mount_attr, 32)


def restrict_files(job):
  """Makes a file system with what the program may read, and makes it the root.

  It is mounted over the folder of the program, whose place in the new root is the same.
  """
  call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
  root = job["folder"]
  mount_tmpfs(root, b"size=1m,mode=0755")
  for path, target in job["links"]:
    Path(root + path).parent.mkdir(parents=True, exist_ok=True)
    Path(root + path).symlink_to(target)
  for path in [*job["visible"], *DEVICES]:
    place = Path(root + path)
    if Path(path).is_dir():
      place.mkdir(parents=True, exist_ok=True)
    else:
      place.parent.mkdir(parents=True, exist_ok=True)
      place.touch()
    call("mount", os.fsencode(path), os.fsencode(place), None, MS_BIND | MS_REC, None)
  Path(root + root).mkdir(parents=True, exist_ok=True)
  set_mount(root, AT_RECURSIVE, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
  for path in DEVICES:
    set_mount(root + path, 0, 0, ATTR_NODEV)
  options = f"size={job['disk']},nr_inodes=1000,mode=0777"
  mount_tmpfs(root + root, options.encode())
  os.chdir(root)
  call("syscall", ctypes.c_long(PIVOT_ROOT[platform.machine()]), b".", b".")
  call("umount2", b".", MNT_DETACH)  # the old root, which is mounted over the new one
  os.chdir("/")


def set_limits(job, extra):
  """Limits each process's resources, and the number of processes.

  Args:
    job: The script's argument.
    extra: The number of processes that are not the program's but count towards the limit.
  """
  limits = {
    resource.RLIMIT_CPU: job["cpu_seconds"],
    resource.RLIMIT_AS: job["memory"],
    resource.RLIMIT_FSIZE: job["disk"],
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_NOFILE: 64,
  }
  if job["isolated"]:
    limits[resource.RLIMIT_NPROC] = job["processes"] + extra
  for name, value in limits.items():
    resource.setrlimit(name, (value, value))  # soft and hard


def become_user(user):
  """Changes from root to a dedicated user, since the kernel does not limit root's processes."""
  os.setgroups([])
  os.setresgid(user, user, user)
  os.setresuid(user, user, user)


def install_seccomp():
  """Installs a seccomp(2) filter that denies system calls which could bypass the sandbox.

  The denied calls are socket for AF_UNIX, since the file system may contain such sockets; shmget,
  whose memory does not count towards any limit; and io_uring_setup, which does work without system
  calls.

  The filter is the BPF program below. Its offsets into struct seccomp_data are 0 for the number of
  the call, 4 for the architecture, and 16 for the lower half of the first argument.

     0  A = architecture
     1  if A == this machine's goto 3
     2  kill
     3  A = number of the call
     4  if A < 0x40000000 goto 6
     5  kill                        the x32 ABI has other numbers
     6  if A != io_uring_setup goto 8
     7  deny
     8  if A != shmget goto 10
     9  deny
    10  if A != socket goto 14
    11  A = first argument
    12  if A != AF_UNIX goto 14
    13  deny                        the call returns EACCES
    14  allow
  """
  if platform.machine() not in ARCHITECTURES:
    raise OSError(f"no seccomp filter is defined for {platform.machine()}")
  architecture, socket, shmget = ARCHITECTURES[platform.machine()]
  load, if_equal, if_at_least, leave = 0x20, 0x15, 0x35, 0x06  # BPF's LD|W|ABS, JEQ, JGE, RET
  kill, allow, deny = 0x80000000, 0x7FFF0000, 0x50000 | EACCES
  program = [  # (instruction, lines to skip if true, lines to skip if false, operand)
    (load, 0, 0, 4),
    (if_equal, 1, 0, architecture),
    (leave, 0, 0, kill),
    (load, 0, 0, 0),
    (if_at_least, 0, 1, 0x40000000),
    (leave, 0, 0, kill),
    (if_equal, 0, 1, IO_URING_SETUP),
    (leave, 0, 0, deny),
    (if_equal, 0, 1, shmget),
    (leave, 0, 0, deny),
    (if_equal, 0, 3, socket),
    (load, 0, 0, 16),
    (if_equal, 0, 1, AF_UNIX),
    (leave, 0, 0, deny),
    (leave, 0, 0, allow),
  ]
  code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
  buffer = ctypes.create_string_buffer(code, len(code))
  sock_fprog = struct.pack("HP", len(program), ctypes.addressof(buffer))
  call("prctl", PR_SET_SECCOMP, 2, sock_fprog, 0, 0)


def exec_program(job, root):
  """Restricts the inner process and replaces it with the program."""
  if job["isolated"]:
    restrict_files(job)
  os.chdir(job["folder"])
  null = os.open("/dev/null", os.O_RDWR)
  os.dup2(null, 1)
  os.dup2(null, 2)
  set_limits(job, 1 if root else 2)
  if job["isolated"] and root:
    become_user(2**30 + job["number"])
  call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  if job["isolated"]:
    install_seccomp()
  call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user resets it
  arguments = [job["python"], "-I", "-B", "-c", job["runner"], *map(str, job["fds"])]
  os.execve(job["python"], arguments, dict(os.environ, HOME=job["folder"]))


def main(job):
  """Runs the outer process; see the module's docstring for its argument and exit codes."""
  end_with_parent()
  root = is_root()
  job["number"] = os.getpid()
  error_from, error_to = os.pipe()  # exec closes it, so the program cannot write to it
  try:
    if job["isolated"]:
      enter_namespaces(root)
    inner = os.fork()
  except OSError as e:
    fail(e)
  if not inner:
    os.close(error_from)
    try:
      exec_program(job, root)
    except (OSError, ValueError) as e:
      os.write(error_to, str(e).encode())
    os._exit(1)
  os.close(error_to)
  for fd in job["fds"]:
    os.close(fd)
  _, status, used = os.wait4(inner, 0)
  if error := os.read(error_from, 1000):
    fail(error.decode())
  if os.WIFSIGNALED(status):
    sys.exit(124 if used.ru_utime + used.ru_stime > job["cpu_seconds"] - 0.2 else 1)


def fail(error):
  """Ends the outer process because the sandbox cannot be created."""
  print(error, file=sys.stderr)
  sys.exit(125)


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
