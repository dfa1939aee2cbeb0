"""The problem families. A maker draws one problem of a level; `None` means the draw fell outside the limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, lcm
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
    """A linear equation in one unknown."""
    scratch, check = Scratch(), Scratch()
    a, x, b = rng.randint(2, 9), rng.randint(1, 99), rng.randint(2, 99)
    c = rng.randint(1, a - 1) if level == 1 else 0
    if level == 0:
        right = a * x + b
        equation = f"{a}x+{b}={right}"
        scratch.say(f"{a}x={right}-{b}")
        scratch.say(f"x={scratch.divide(scratch.subtract(right, b), a)}")
        check.add(check.multiply(x, a), b)
    elif level == 1:
        right = (a - c) * x + b
        d = rng.randint(1, b)
        right, b = right - b + d + (b - d), b - d
        if b == 0:
            return None
        d = right - (a - c) * x - b
        b, d = b, b + d
        equation = f"{a}x+{b}={c}x+{d + (a - c) * x}"
        right = d + (a - c) * x
        scratch.say(f"{a}-{c}={a - c}")
        scratch.say(f"{a - c}x={right}-{b}")
        rest = scratch.subtract(right, b)
        return None if rest % (a - c) else _linear_two_sided(scratch, a, b, c, right, rest)
    else:
        offset = rng.randint(2, 40)
        right = a * (x + offset) + b
        equation = f"{a}(x+{offset})+{b}={right}"
        scratch.say(f"{a}(x+{offset})={right}-{b}")
        total = scratch.divide(scratch.subtract(right, b), a)
        scratch.say(f"x={total}-{offset}")
        x = scratch.subtract(total, offset)
        check.add(check.multiply(check.add(x, offset), a), b)
    return None
