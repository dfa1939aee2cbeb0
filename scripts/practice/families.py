"""The problem families. A maker draws one problem of a level; `None` means the draw fell outside the limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from practice.arithmetic import Scratch

LEVELS = (0, 1, 2)
LARGEST = 999


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One problem with its worked solution. `key` names the mathematics, whatever the wording."""

    key: tuple[int | str, ...]
    wordings: tuple[str, ...]
    answer: int
    lines: tuple[str, ...]
    check: tuple[str, ...] = ()


Maker = Callable[[Random, int], Draft | None]


def make_gcd(rng: Random, level: int) -> Draft | None:
    """Greatest common divisor by Euclid's algorithm."""
    limit = (99, 300, LARGEST)[level]
    divisor = rng.randint(1, (12, 30, 60)[level])
    first = rng.randint(2, limit // divisor)
    second = rng.randint(1, first - 1)
    a, b = first * divisor, second * divisor
    scratch = Scratch()
    scratch.say("Use the Euclidean algorithm.")
    x, y = a, b
    while y:
        quotient, rest = divmod(x, y)
        if quotient > 9:
            return None
        scratch.say(f"gcd({x},{y})")
        scratch.subtract(x, scratch.multiply(y, quotient) if quotient > 1 else y)
        x, y = y, rest
    scratch.say(f"gcd({x},0)={x}")
    check = Scratch()
    if 1 < x < 10:
        check.divide(a, x)
        check.divide(b, x)
    return Draft(
        key=(a, b),
        wordings=(
            f"Find the greatest common divisor of {a} and {b}.",
            f"What is the gcd of {b} and {a}?",
            f"Compute gcd({a},{b}).",
            f"What is the largest integer that divides both {a} and {b}?",
            f"Two ropes are {b} cm and {a} cm long. They are cut into equal pieces, as long as possible, with nothing "
            "left over. How long is each piece in cm?",
        ),
        answer=x,
        lines=tuple(scratch.lines),
        check=tuple(check.lines),
    )


def make_modular(rng: Random, level: int) -> Draft | None:
    """The remainder of a product."""
    modulus = rng.randint(3, 9) if level == 0 else rng.randint(7, 19)
    factors = [rng.randint(11, 99) for _ in range(3 if level == 2 else 2)]
    scratch = Scratch()
    residues = [scratch.remainder(factor, modulus) for factor in factors]
    value = residues[0]
    for residue in residues[1:]:
        value = scratch.remainder(scratch.multiply(value, residue), modulus)
    if value == 0 and rng.random() < 0.8:
        return None
    product = "*".join(map(str, factors))
    return Draft(
        key=(modulus, *sorted(factors)),
        wordings=(
            f"What is the remainder when {product} is divided by {modulus}?",
            f"Compute {product} mod {modulus}.",
            f"Find the remainder of {product} modulo {modulus}.",
            f"The number {product} is divided by {modulus}. What remainder is left?",
        ),
        answer=value,
        lines=tuple(scratch.lines),
    )


def make_linear(rng: Random, level: int) -> Draft | None:
    """A linear equation in one unknown: plain, with the unknown on both sides, or with a bracket."""
    scratch, check = Scratch(), Scratch()
    a, x, b = rng.randint(2, 9), rng.randint(1, 99), rng.randint(2, 99)
    c, offset = 0, 0
    if level == 1:
        c = rng.randint(1, a - 1)
    if level == 2:
        offset = rng.randint(2, 60)
    right = (a - c) * (x + offset) + b
    largest = right + c * x
    if max(largest, a * x + b) > LARGEST:
        return None
    bracket = f"(x+{offset})" if offset else "x"
    equation = f"{a}{bracket}+{b}={c if c > 1 else ''}x+{right}" if c else f"{a}{bracket}+{b}={right}"
    if c:
        scratch.say(f"{a}-{c}={a - c}")
    scratch.say(f"{a - c if a - c > 1 else ''}{bracket}={right}-{b}")
    total = scratch.subtract(right, b)
    if a - c > 1:
        total = scratch.divide(total, a - c)
    if offset:
        scratch.say(f"x={total}-{offset}")
        scratch.subtract(total, offset)
    if not c:
        check.add(check.multiply(check.add(x, offset) if offset else x, a), b)
    spoken = f"I think of a number, multiply it by {a} and add {b}. The result is {right}. What is the number?"
    return Draft(
        key=(a, b, c, offset, right),
        wordings=(
            f"Solve for x: {equation}.",
            f"Find x if {equation}.",
            f"For which x is {equation}?",
            f"What is the solution of the equation {equation}?",
            *((spoken,) if level == 0 else ()),
        ),
        answer=x,
        lines=tuple(scratch.lines),
        check=tuple(check.lines),
    )


def make_series(rng: Random, level: int) -> Draft | None:
    """A term of an arithmetic series, or the sum of its first terms."""
    a, step = rng.randint(1, 60), rng.randint(2, 19)
    n = rng.randint(4, 40) if level == 0 else rng.randint(4, 12) if level == 1 else rng.randint(10, 30)
    if level == 2:
        a, step = rng.randint(1, 30), rng.randint(2, 6)
    last = a + (n - 1) * step
    total = n * (a + last) // 2
    if max(last, total if level else 0) > LARGEST:
        return None
    scratch = Scratch()
    scratch.say(f"{n}-1={n - 1}")
    scratch.add(a, scratch.multiply(step, n - 1))
    if level == 0:
        wordings: tuple[str, ...] = (
            f"An arithmetic series starts with {a} and has difference {step}. What is term number {n}?",
            f"Find term number {n} of the arithmetic series {a}, {a + step}, {a + 2 * step}, ...",
            f"A worker earns {a} coins on day 1 and {step} more on each next day. What does he earn on day {n}?",
        )
        answer = last
    else:
        wordings = (
            f"An arithmetic series starts with {a} and has difference {step}. Find the sum of its first {n} terms.",
            f"Find the sum of the first {n} terms of {a}, {a + step}, {a + 2 * step}, ...",
            f"A hall has {n} rows of seats. The first row has {a} seats and each next row has {step} more. "
            "How many seats are there?",
        )
        answer = total
        scratch.say(f"sum={n}*({a}+{last})/2")
        both = scratch.add(last, a)
        if both % 2 == 0:
            scratch.multiply(scratch.divide(both, 2), n)
        else:
            scratch.say(f"{n}/2={n // 2}")
            scratch.multiply(both, n // 2)
    return Draft(key=(level > 0, a, step, n), wordings=wordings, answer=answer, lines=tuple(scratch.lines))


def make_recurrence(rng: Random, level: int) -> Draft | None:
    """A chain: x -> (p*x+q) mod m, several times."""
    modulus = rng.randint(5, 9) if level == 0 else rng.randint(7, 19)
    steps = rng.randint(*((3, 4), (4, 6), (7, 10))[level])
    p, q = rng.randint(2, 5), rng.randint(1, 9)
    start = value = rng.randint(1, modulus - 1)
    scratch = Scratch()
    for index in range(1, steps + 1):
        raw = p * value + q
        line = f"x{index}:{p}*{value}+{q}={p * value}+{q}={raw}"
        if raw >= modulus:
            quotient = raw // modulus
            product = quotient * modulus
            line += f",{quotient}*{modulus}={product}" if quotient > 1 else ""
            line += f",{raw}-{product}={raw - product}"
        if raw % modulus == value:
            return None
        value = raw % modulus
        scratch.say(f"{line}->{value}")
    return Draft(
        key=(modulus, p, q, start, steps),
        wordings=(
            f"Let x0={start} and let each next term be {p} times the last one plus {q}, modulo {modulus}. "
            f"Find x{steps}.",
            f"A machine replaces x by the remainder of {p}x+{q} modulo {modulus}. It starts with x={start}. "
            f"What is x after {steps} steps?",
            f"Start with {start}. Do this {steps} times: multiply by {p}, add {q} and keep the remainder modulo "
            f"{modulus}. What number do you get?",
        ),
        answer=value,
        lines=tuple(scratch.lines),
    )
