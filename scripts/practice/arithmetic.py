"""Written-out arithmetic: every step is one small operation on numbers of at most three digits.

A `Scratch` collects the lines of a solution. Long operations carry their column notes on one line, lowest digit first:

    47+38:7+8=15,4+3+1=8->85          addition with carries
    632-285:12-5=7,13-8-1=4,6-2-1=3->347   subtraction with borrows
    38*7:8*7=56,3*7+5=21+5=26->266    multiplication by one digit
    371/7:37=5*7+2,21=3*7+0->53       division by one digit
    734 mod 13:5*13=65,73-65=8,6*13=78,84-78=6->6
"""

from __future__ import annotations


def digits_low_first(number: int) -> list[int]:
    """Decimal digits of a number, ones first."""
    return [int(digit) for digit in reversed(str(number))]


def column_sum(a: int, b: int) -> str:
    """`a+b` with one note per column."""
    left, right = digits_low_first(a), digits_low_first(b)
    notes, carry = [], 0
    for column in range(max(len(left), len(right))):
        terms = [row[column] for row in (left, right) if column < len(row)] + [1] * carry
        total = sum(terms)
        notes.append("+".join(map(str, terms)) + (f"={total}" if len(terms) > 1 else ""))
        carry = total // 10
    return f"{a}+{b}:{','.join(notes)}->{a + b}"


def column_difference(a: int, b: int) -> str:
    """`a-b` for a >= b, with one note per column; a borrow shows as a top digit above nine and a `-1` to its left."""
    left, right = digits_low_first(a), digits_low_first(b)
    notes, borrow = [], 0
    for column, top in enumerate(left):
        taken = ([right[column]] if column < len(right) else []) + [1] * borrow
        borrow = int(top < sum(taken))
        shown = top + 10 * borrow
        notes.append("-".join(map(str, [shown, *taken])) + (f"={shown - sum(taken)}" if taken else ""))
    return f"{a}-{b}:{','.join(notes)}->{a - b}"


def column_product(a: int, digit: int) -> str:
    """`a*digit` for a one-digit factor, with one note per column."""
    notes, carry = [], 0
    for top in digits_low_first(a):
        product = top * digit
        plus = f"+{carry}={product}+{carry}={product + carry}" if carry else f"={product}"
        notes.append(f"{top}*{digit}{plus}")
        carry = (product + carry) // 10
    return f"{a}*{digit}:{','.join(notes)}->{a * digit}"


def division_notes(number: int, divisor: int) -> list[str]:
    """Notes of the long division, one group per quotient digit, highest first."""
    notes: list[str] = []
    text, rest = str(number), 0
    started = False
    for position, digit in enumerate(text):
        rest = 10 * rest + int(digit)
        if not started and rest < divisor and position + 1 < len(text):
            continue
        started = True
        quotient = rest // divisor
        if divisor < 10:
            notes.append(f"{rest}={quotient}*{divisor}+{rest % divisor}")
        elif quotient == 0:
            notes.append(f"{rest}<{divisor}")
        else:
            product = quotient * divisor
            notes.append(f"{quotient}*{divisor}={product},{rest}-{product}={rest - product}")
        rest %= divisor
    return notes


class Scratch:
    """The lines of one solution. Each operation writes its line and returns its value."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Write a line of words."""
        self.lines.append(line)

    def add(self, a: int, b: int) -> int:
        """a+b; notes unless one term is a single digit and the sum is small."""
        easy = min(a, b) < 10 and a + b < 100
        self.say(f"{a}+{b}={a + b}" if easy else column_sum(a, b))
        return a + b

    def subtract(self, a: int, b: int) -> int:
        """a-b for a >= b."""
        assert a >= b
        easy = a < 100 and b < 10
        self.say(f"{a}-{b}={a - b}" if easy else column_difference(a, b))
        return a - b

    def multiply(self, a: int, b: int) -> int:
        """a*b with partial products for two-digit factors."""
        if b >= 10 > a:
            a, b = b, a
        if b <= 1 or a < 10:
            self.say(f"{a}*{b}={a * b}")
            return a * b
        if b < 10:
            self.say(column_product(a, b))
            return a * b
        tens, ones = divmod(b, 10)
        high = self.multiply(a, tens) * 10
        if ones:
            self.add(high, self.multiply(a, ones))
        self.say(f"{a}*{b}={a * b}")
        return a * b

    def divide(self, number: int, divisor: int) -> int:
        """Floor of number/divisor."""
        quotient, rest = divmod(number, divisor)
        tail = f"{quotient} r{rest}" if rest else f"{quotient}"
        self.say(f"{number}/{divisor}:{','.join(division_notes(number, divisor))}->{tail}")
        return quotient

    def remainder(self, number: int, modulus: int) -> int:
        """number mod modulus."""
        self.say(f"{number} mod {modulus}:{','.join(division_notes(number, modulus))}->{number % modulus}")
        return number % modulus
