"""The system calls that code in the sandbox may make: a seccomp filter, built as plain data and installed with prctl.

It is an allow list: one process with one thread that computes, reads files and writes its output. No socket, no new
process or thread, no exec, no signal to anybody else, no change of permissions. What is not listed fails with
EPERM, and calls newer than the list with ENOSYS, so that the C library falls back to older ones.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

__all__ = ["install", "program", "supported"]

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, operand: ``struct sock_filter`` of linux/filter.h."""

_LOAD, _EQUAL, _ANY_BIT, _GREATER, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x45, 0x25, 0x35, 0x54, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_DENY = 0x00050000 | errno.EPERM
_UNKNOWN = 0x00050000 | errno.ENOSYS
_FIRST_NEW_CALL = 424
"""From here on both architectures number their calls alike, and C libraries expect that any of them may be missing."""

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_O_ACCMODE = os.O_WRONLY | os.O_RDWR
_HARMLESS_IOCTLS = (0x5401, 0x541B, 0x5450, 0x5451)
"""TCGETS (isatty), FIONREAD, FIONCLEX, FIOCLEX."""
_LAST_HARMLESS_FCNTL, _F_DUPFD_CLOEXEC = 4, 1030
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL are 0 to 4. F_SETOWN, which can send signals, is not among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    audit: int
    """AUDIT_ARCH_* of linux/audit.h."""
    column: int
    """Of the table below."""


_ARCHITECTURES = {
    "x86_64": _Architecture(audit=0xC000003E, column=0),
    "aarch64": _Architecture(audit=0xC00000B7, column=1),
}
# name: number on x86_64, number on aarch64 (0: it has no such call; 0 on x86_64 is read). From asm/unistd_64.h and
# asm-generic/unistd.h of Linux 6.1.
_ALLOWED = """
read 0 63|write 1 64|readv 19 65|writev 20 66|pread64 17 67|pwrite64 18 68|close 3 57|lseek 8 62|dup 32 23|dup2 33 0
dup3 292 24|fstat 5 80|stat 4 0|lstat 6 0|newfstatat 262 79|statx 332 291|access 21 0|faccessat 269 48
faccessat2 439 439|readlink 89 0|readlinkat 267 78|getcwd 79 17|chdir 80 49|fchdir 81 50|getdents64 217 61
mkdir 83 0|mkdirat 258 34|rmdir 84 0|unlink 87 0|unlinkat 263 35|rename 82 0|renameat 264 38|renameat2 316 276
ftruncate 77 46|fsync 74 82|fdatasync 75 83|fadvise64 221 223|umask 95 166|mmap 9 222|munmap 11 215
mprotect 10 226|mremap 25 216|madvise 28 233|brk 12 214|rt_sigaction 13 134|rt_sigprocmask 14 135
rt_sigreturn 15 139|rt_sigpending 127 136|rt_sigtimedwait 128 137|rt_sigsuspend 130 133|sigaltstack 131 132
pause 34 0|getpid 39 172|getppid 110 173|gettid 186 178|getuid 102 174|geteuid 107 175|getgid 104 176
getegid 108 177|getgroups 115 158|getpgid 121 155|getpgrp 111 0|getsid 124 156|getrandom 318 278
clock_gettime 228 113|clock_getres 229 114|clock_nanosleep 230 115|nanosleep 35 101|gettimeofday 96 169|time 201 0
times 100 153|getrusage 98 165|getrlimit 97 163|getitimer 36 102|setitimer 38 103|alarm 37 0|futex 202 98
set_robust_list 273 99|rseq 334 293|sched_yield 24 124|sched_getaffinity 204 123|getcpu 309 168|select 23 0
pselect6 270 72|poll 7 0|ppoll 271 73|exit 60 93|exit_group 231 94|restart_syscall 219 128|uname 63 160
sysinfo 99 179
"""
_RESTRICTED = "openat 257 56|fcntl 72 25|ioctl 16 29|kill 62 129|tgkill 234 131"


def supported() -> bool:
    """True where the table knows the processor's system calls."""
    return platform.machine() in _ARCHITECTURES


def program(machine: str, pid: int) -> list[Instruction]:
    """The filter for process ``pid`` on ``machine`` (``x86_64`` or ``aarch64``)."""
    architecture = _ARCHITECTURES[machine]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    rules = _rules(pid)
    for name, number in _numbers(_RESTRICTED, architecture).items():
        body = rules[name]
        code += [(_EQUAL, 0, len(body), number), *body]
    for number in _numbers(_ALLOWED, architecture).values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # The calls of the x32 interface have numbers from 0x40000000 on, and end here too.
    code += [(_AT_LEAST, 0, 1, _FIRST_NEW_CALL), (_RETURN, 0, 0, _UNKNOWN), (_RETURN, 0, 0, _DENY)]
    return code


def install() -> None:
    """Put the filter on this process for good. Needs no_new_privs. Raises :class:`OSError`."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    code = program(platform.machine(), os.getpid())
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
    described = Program(len(code), ctypes.cast(packed, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(described), 0, 0):
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def _numbers(table: str, architecture: _Architecture) -> dict[str, int]:
    numbers = {}
    for entry in table.replace("\n", "|").split("|"):
        if entry:
            name, *columns = entry.split()
            if columns[architecture.column] != "0" or name == "read":
                numbers[name] = int(columns[architecture.column])
    return numbers


def _rules(pid: int) -> dict[str, list[Instruction]]:
    """For each restricted call the instructions that end in a verdict. Arguments are ints: their low word counts."""

    def argument(position: int) -> Instruction:
        return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * position)  # both architectures are little-endian

    def one_of(values: tuple[int, ...]) -> list[Instruction]:
        tests = [each for value in values for each in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
        return [*tests, (_RETURN, 0, 0, _DENY)]

    return {
        # Opening a file to read it must not empty it: Landlock lets that pass before its third version.
        "openat": [
            argument(2),
            (_ANY_BIT, 1, 0, os.O_TRUNC),
            (_RETURN, 0, 0, _ALLOW),
            (_AND, 0, 0, _O_ACCMODE),
            *one_of((os.O_WRONLY, os.O_RDWR)),
        ],
        "fcntl": [
            argument(1),
            (_GREATER, 1, 0, _LAST_HARMLESS_FCNTL),
            (_RETURN, 0, 0, _ALLOW),
            *one_of((_F_DUPFD_CLOEXEC,)),
        ],
        "ioctl": [argument(1), *one_of(_HARMLESS_IOCTLS)],
        "kill": [argument(0), *one_of((pid,))],
        "tgkill": [argument(0), *one_of((pid,))],
    }
