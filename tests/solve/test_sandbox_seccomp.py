"""The system call filter of both processors, through an interpreter of its program."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest

from trtkit.solve.sandbox_seccomp import program

Verdict = Callable[[int, int, tuple[int, ...]], int]


def verdict_of(machine: str) -> Verdict:
    """An interpreter of the filter, as linux/filter.h describes it."""
    code = program(machine, 77)

    def verdict(arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
        words = {0: number, 4: arch, **{16 + 8 * place: value & 0xFFFFFFFF for place, value in enumerate(arguments)}}
        at = accumulator = 0
        while True:
            operation, yes, no, operand = code[at]
            at += 1
            if operation == 0x06:
                return operand
            if operation == 0x20:
                accumulator = words[operand]
            elif operation == 0x54:
                accumulator &= operand
            else:
                truth = {
                    0x15: accumulator == operand,
                    0x25: accumulator > operand,
                    0x35: accumulator >= operand,
                    0x45: bool(accumulator & operand),
                }[operation]
                at += yes if truth else no

    return verdict


@pytest.mark.parametrize(
    ("machine", "arch", "read", "refused", "openat", "kill"),
    [
        # socket, connect, clone, execve, ptrace, setsid, chmod, prctl, shmget, io_uring_setup is new
        ("x86_64", 0xC000003E, 0, (41, 42, 56, 57, 59, 101, 112, 90, 157, 29), 257, 62),
        ("aarch64", 0xC00000B7, 63, (198, 203, 220, 221, 117, 157, 53, 167, 194), 56, 129),
    ],
)
def test_the_filter_on_both_processors(
    machine: str, arch: int, read: int, refused: Sequence[int], openat: int, kill: int
) -> None:
    verdict = verdict_of(machine)
    allow, deny, unknown, end = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    assert verdict(arch, read, ()) == allow
    assert {verdict(arch, number, (0, 0, 0)) for number in refused} == {deny}
    assert verdict(arch, 425, ()) == unknown
    assert verdict(arch, 0x40000000 + read, ()) in (deny, unknown)
    assert verdict(0x40000003, read, ()) == end, "32-bit calls have other numbers"
    trunc, write, both = os.O_TRUNC, os.O_WRONLY, os.O_RDWR
    flags = {0: allow, write: allow, write | trunc: allow, both | trunc: allow, trunc: deny, 3 | trunc: deny}
    assert {each: verdict(arch, openat, (0, 0, each)) for each in flags} == flags
    assert [verdict(arch, kill, (who, 9)) for who in (77, 78, 0, -1, -77)] == [allow, deny, deny, deny, deny]
