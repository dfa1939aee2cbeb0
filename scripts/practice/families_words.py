"""The families told as counting, number bases and shopping."""

from __future__ import annotations

from math import gcd
from random import Random

from practice.arithmetic import Scratch
from practice.families import LARGEST, Draft

NAMES = ("Anna", "Ben", "Mia", "Tom")
GOODS = ("pens", "books", "cups", "toys", "lamps", "bags")
CLUBS = (("tea", "coffee"), ("chess", "music"), ("dogs", "cats"))


def make_counting(rng: Random, level: int) -> Draft | None:
    """Inclusion and exclusion: two groups of people, or multiples of two numbers."""
    return _count_people(rng) if level == 0 else _count_multiples(rng, neither=level == 2)


def _count_people(rng: Random) -> Draft | None:
    both = rng.randint(2, 150)
    first, second = both + rng.randint(1, 250), both + rng.randint(1, 250)
    union = first + second - both
    outside = rng.choice((0, rng.randint(1, 150)))
    total = union + outside
    a, b = rng.choice(CLUBS)
    scratch, check = Scratch(), Scratch()
    scratch.subtract(scratch.add(first, second), both)
    facts = f"{first} like {a}, {second} like {b} and {both} like both"
    if outside:
        wordings: tuple[str, ...] = (
            f"Of {total} people, {facts}. How many like neither?",
            f"In a town of {total} people, {facts}. How many people like neither {a} nor {b}?",
        )
        scratch.subtract(total, union)
        check.add(union, outside)
    else:
        wordings = (
            f"In a group, {facts}. How many like {a} or {b}?",
            f"In a school, {facts}. How many like at least one of the two?",
        )
        check.subtract(union + both, second)
    return Draft(
        key=("people", *sorted((first, second)), both, outside),
        wordings=wordings,
        answer=outside or union,
        lines=tuple(scratch.lines),
        check=tuple(check.lines),
    )


def _count_multiples(rng: Random, *, neither: bool) -> Draft | None:
    p, q = sorted(rng.sample(range(2, 13), 2))
    common = p * q // gcd(p, q)
    limit = rng.randint(30, LARGEST if neither else 400)
    if common > 42 or q % p == 0 or limit // p > LARGEST:
        return None
    scratch, check = Scratch(), Scratch()
    multiples_p = scratch.divide(limit, p)
    multiples_q = scratch.divide(limit, q)
    scratch.say(f"lcm({p},{q})={common}")
    multiples_both = scratch.divide(limit, common)
    both = scratch.add(multiples_p, multiples_q)
    union = scratch.subtract(both, multiples_both)
    check.add(union, multiples_both)
    answer = union
    if neither:
        answer = scratch.subtract(limit, union)
        check = Scratch()
        check.add(answer, union)
        wordings: tuple[str, ...] = (
            f"How many integers from 1 to {limit} are divisible by neither {p} nor {q}?",
            f"Count the integers from 1 to {limit} that are not divisible by {p} and not divisible by {q}.",
        )
    else:
        wordings = (
            f"How many integers from 1 to {limit} are divisible by {p} or {q}?",
            f"Count the integers from 1 to {limit} that are divisible by at least one of {p} and {q}.",
            f"How many positive integers up to {limit} are multiples of {p} or of {q}?",
        )
    return Draft(
        key=("multiples", neither, p, q, limit),
        wordings=wordings,
        answer=answer,
        lines=tuple(scratch.lines),
        check=tuple(check.lines),
    )


def in_base(number: int, base: int) -> str:
    """Digits of a number in a base of at most ten."""
    text = ""
    while number:
        number, digit = divmod(number, base)
        text = str(digit) + text
    return text or "0"


def _read_base(scratch: Scratch, text: str, base: int) -> int:
    value = int(text[0])
    for digit in text[1:]:
        value = scratch.add(scratch.multiply(value, base), int(digit))
    return value


def make_base(rng: Random, level: int) -> Draft | None:
    """Number bases: reading, writing, and adding two numbers of a base."""
    base = rng.randint(3, 9)
    scratch = Scratch()
    if level == 0:
        text = in_base(rng.randint(base * base, min(LARGEST, base**4 - 1)), base)
        answer = _read_base(scratch, text, base)
        key: tuple[int | str, ...] = ("read", text, base)
        wordings: tuple[str, ...] = (
            f"Write the base {base} number {text} in base ten.",
            f"What is {text} in base {base} as a decimal number?",
            f"The digits {text} are a number in base {base}. What is its decimal value?",
        )
    elif level == 1:
        number = rng.randint(base * base, base**3 - 1)
        value, answer = number, int(in_base(number, base))
        while value:
            value = scratch.divide(value, base) if value >= base else _last_digit(scratch, value)
        scratch.say(f"digits {answer}")
        key = ("write", number, base)
        wordings = (
            f"Write {number} in base {base}.",
            f"What are the digits of {number} in base {base}?",
            f"Convert the decimal number {number} to base {base}.",
        )
    else:
        texts = [in_base(rng.randint(base * base, min(499, base**4 - 1)), base) for _ in range(2)]
        answer = scratch.add(*(_read_base(scratch, text, base) for text in texts))
        key = ("sum", *sorted(texts), base)
        wordings = (
            f"Add the base {base} numbers {texts[0]} and {texts[1]}. Write the sum in base ten.",
            f"What is {texts[0]}+{texts[1]} in base {base} as a decimal number?",
        )
    if not 0 <= answer <= LARGEST:
        return None
    return Draft(key=key, wordings=wordings, answer=answer, lines=tuple(scratch.lines))


def _last_digit(scratch: Scratch, value: int) -> int:
    scratch.say(f"{value}->0 r{value}")
    return 0


def make_shopping(rng: Random, level: int) -> Draft | None:
    """Prices times counts, then change or equal shares."""
    kinds = level + 1
    counts = [rng.randint(2, 12) for _ in range(kinds)]
    prices = [rng.randint(3, 99) for _ in range(kinds)]
    goods = rng.sample(GOODS, kinds)
    total = sum(count * price for count, price in zip(counts, prices, strict=True))
    friends = rng.randint(2, 9) if level and rng.random() < 0.4 else 0
    paid = total + rng.randint(1, 200)
    if max(total, paid) > LARGEST or (friends and total % friends):
        return None
    scratch, check = Scratch(), Scratch()
    spent = 0
    for count, price in zip(counts, prices, strict=True):
        cost = scratch.multiply(price, count)
        spent = scratch.add(spent, cost) if spent else cost
    name = rng.choice(NAMES)
    parts = [f"{c} {g} at {p} coins each" for c, g, p in zip(counts, goods, prices, strict=True)]
    basket = parts[0] if kinds == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    if friends:
        answer = scratch.divide(total, friends)
        check.multiply(answer, friends)
        wordings: tuple[str, ...] = (
            f"{friends} friends buy {basket}. They share the cost equally. How many coins does each one pay?",
        )
    else:
        answer = scratch.subtract(paid, total)
        check.add(total, answer)
        wordings = (
            f"{name} buys {basket} and pays with {paid} coins. How many coins does {name} get back?",
            f"{name} has {paid} coins and buys {basket}. How many coins are left?",
        )
    return Draft(
        key=(
            friends,
            0 if friends else paid,
            *(n for pair in sorted(zip(counts, prices, strict=True)) for n in pair),
        ),
        wordings=wordings,
        answer=answer,
        lines=tuple(scratch.lines),
        check=tuple(check.lines),
    )
