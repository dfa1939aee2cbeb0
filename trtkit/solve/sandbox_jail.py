"""The walls of the sandbox: what a process does to itself before it runs code that nobody has read.

Four layers, each asked of the kernel without privileges, each enough to stop something on its own:

    namespaces   user, process, network, IPC and host name spaces of its own: no network device but a loopback that is
                 down, nobody else to send a signal to, and everything in it dies with its first process
    root         a file system of its own: the libraries read-only, an empty folder in memory (also known as /tmp, if
                 no library lies there), nothing else
    landlock     the kernel's file rules: reading the libraries, writing the own folder, nothing else; no TCP
    seccomp      an allow list of system calls (sandbox_seccomp.py)

Resource limits, no_new_privs and empty capability sets are always on.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import signal
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtkit.solve import sandbox_seccomp

__all__ = [
    "FOLDER_BYTES",
    "LAYERS",
    "Jail",
    "adopt_orphans",
    "die_with_parent",
    "enter_namespaces",
    "folder_place",
    "lock",
    "only_folder",
    "readable_places",
]

LAYERS = ("namespaces", "root", "landlock", "seccomp")
FOLDER_BYTES = 16 << 20
"""Largest file, and with the ``root`` layer the size of the whole folder."""
_FOLDER_FILES = 1024
_OPEN_FILES = 64
_PROCESSES = 32
"""Only where seccomp does not refuse new processes anyway."""

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
_AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = -100, 0x8000, 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
# Alike on x86_64 and aarch64, except for the two pairs.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}


@dataclass(frozen=True, slots=True, kw_only=True)
class Jail:
    """What a call may have."""

    layers: tuple[str, ...]
    readable: tuple[str, ...]
    """Absolute directories with the interpreter's library, its packages and the shared libraries."""
    address_bytes: int
    """Most address space, that of the interpreter and its preloaded packages included."""
    cpu_seconds: int


def readable_places(packages: Sequence[str]) -> tuple[str, ...]:
    """Directories that the code may read: the standard library, ``packages``, the shared libraries."""
    # Not sysconfig's "platstdlib": in a virtual environment that is the environment, with every package in it.
    found = [os.path.dirname(os.__file__), str(sysconfig.get_config_var("DESTSHARED"))]
    found += ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    for name in packages:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or []) if spec else []:
            found += [place, f"{place}.libs"]
    kept: list[str] = []
    for place in sorted({place for place in found if os.path.isdir(place)}, key=len):
        if not any(place.startswith(other + "/") for other in kept):
            kept.append(place)
    return tuple(kept)


def enter_namespaces() -> None:
    """Move into new namespaces; the next child is the first process of the new process space."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", _libc().unshare(_NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def folder_place(readable: Sequence[str]) -> str:
    """Where the code's folder lies in its own root: a directory that holds none of ``readable``, so it covers none."""
    place = "/folder"
    while place in _tops(readable):
        place += "_"
    return place


def _tops(places: Sequence[str]) -> set[str]:
    """``/usr`` for ``/usr/lib``."""
    return {"/" + place.split("/")[1] for place in places}


def only_folder(jail: Jail, new_root: str) -> None:
    """Make a fresh file system at ``new_root`` (an empty directory) the root, and go to the code's empty folder in it.

    ``/tmp`` is that folder too, unless libraries lie there, as with a virtual environment made in ``/tmp``: then it
    holds those, read-only, and nothing else.
    """
    libc = _libc()
    folder = folder_place(jail.readable)

    def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
        words = [text.encode() if text is not None else None for text in (source, target, kind, options)]
        _call(f"mount {target}", libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))

    mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    mount("none", new_root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for place in jail.readable:
        os.makedirs(new_root + place, exist_ok=True)
        mount(place, new_root + place, None, _MS_BIND | _MS_REC)
        _read_only(new_root + place)
    for directory in (folder, "/dev"):
        os.makedirs(new_root + directory, exist_ok=True)
    options = f"size={FOLDER_BYTES},nr_inodes={_FOLDER_FILES},mode=700"
    mount("none", new_root + folder, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    if "/tmp" not in _tops(jail.readable):
        os.symlink(folder, new_root + "/tmp")
    Path(new_root + "/dev/null").touch()
    mount("/dev/null", new_root + "/dev/null", None, _MS_BIND)
    os.chdir(new_root)
    # The old root ends up on top of the new one and is taken off: no directory is needed to put it in.
    _call("pivot_root", libc.syscall(_number(_PIVOT_ROOT), b".", b"."))
    _call("umount", libc.umount2(b".", _MNT_DETACH))
    _read_only("/", recursive=False)
    os.chdir(folder)


def lock(jail: Jail, folder: str) -> None:
    """The last step before the code runs: limits, no privileges, file rules, system calls. No way back."""
    libc = _libc()
    _limit(jail)
    _call("no_new_privs", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _drop_capabilities(libc)
    if "landlock" in jail.layers:
        _landlock(libc, jail.readable, folder)
    if "seccomp" in jail.layers:
        sandbox_seccomp.install()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, which forked it, is gone; it ends at once where that is so."""
    _call("pdeathsig", _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() not in (parent, 0):  # 0: from within a process space of its own the parent has no number
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _call("subreaper", _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def _limit(jail: Jail) -> None:
    limits = {
        resource.RLIMIT_AS: jail.address_bytes,
        resource.RLIMIT_CPU: jail.cpu_seconds,
        resource.RLIMIT_FSIZE: FOLDER_BYTES,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: _PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _call("capset", libc.syscall(_number(_CAPSET), header, (ctypes.c_uint32 * 6)()))


def _read_only(path: str, *, recursive: bool = True) -> None:
    wanted = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc().syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, wanted, ctypes.sizeof(wanted))
    _call(f"read-only {path}", result)


def _landlock(libc: ctypes.CDLL, readable: Sequence[str], folder: str) -> None:
    """See linux/landlock.h for the bits. Rights that a kernel does not know yet are left out, as it asks."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    _call("landlock", version)
    last_file_right = {1: 12, 2: 13, 3: 14, 4: 14}.get(version, 15)
    everything = (1 << last_file_right + 1) - 1
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = (ctypes.c_uint64 * 3)(everything, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(_LANDLOCK_CREATE, attributes, size, 0)
    _call("landlock_create_ruleset", rules)
    read = (1 << 2) | (1 << 3)  # READ_FILE, READ_DIR
    # And WRITE_FILE, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE; no links, sockets, pipes or devices.
    write = read | (1 << 1) | (1 << 4) | (1 << 5) | (1 << 7) | (1 << 8) | (1 << 14)
    allowed = [*((place, read) for place in readable), (folder, write), ("/dev/null", (1 << 2) | (1 << 1) | (1 << 14))]
    for place, rights in allowed:
        _landlock_allow(libc, rules, place, rights & everything)
    _call("landlock_restrict_self", libc.syscall(_LANDLOCK_RESTRICT, rules, 0))
    os.close(rules)


def _landlock_allow(libc: ctypes.CDLL, rules: int, place: str, rights: int) -> None:
    class Beneath(ctypes.Structure):
        _pack_ = 1
        _layout_ = "ms"
        _fields_ = (("rights", ctypes.c_uint64), ("directory", ctypes.c_int32))

    opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(f"landlock {place}", libc.syscall(_LANDLOCK_ADD, rules, 1, ctypes.byref(Beneath(rights, opened)), 0))
    finally:
        os.close(opened)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _number(numbers: dict[str, int]) -> int:
    machine = os.uname().machine
    if machine not in numbers:
        raise OSError(f"the system calls of {machine} are not known here")
    return numbers[machine]


def _call(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
