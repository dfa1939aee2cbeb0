"""Exact arithmetic on numbers written in LaTeX. Small, bounded and without symbolic algebra."""

from __future__ import annotations

import math
import re
from fractions import Fraction

__all__ = ["MAX_CHARACTERS", "MIXED", "exact_value"]

MAX_CHARACTERS = 1000
"""Longer answers are compared as they stand."""
MIXED = re.compile(r"^([-+]?)([0-9]+) ([0-9]+)/([0-9]+)$")
"""``1 1/2``."""
_MAX_BITS = 4096
_MAX_DEPTH = 24
_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_SCIENTIFIC = re.compile(rf"([-+]?)({_NUMBER})[eE]([-+]?[0-9]{{1,3}})")
_TOKENS = re.compile(rf"\s*({_NUMBER}|\\(?:frac|binom|sqrt|times|cdot|div)(?![A-Za-z])|[-+*/^!(){{}}])")


def exact_value(text: str) -> Fraction | None:
    """The exact value of a number or of arithmetic on numbers, such as ``\\frac{84}{2}`` or ``2^{10}``.

    None for everything else, and for numbers of more than about a thousand digits: this never takes long.
    """
    if not text or len(text) > MAX_CHARACTERS:
        return None
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific:
        sign, digits, exponent = scientific.groups()
        value = Fraction("0" + digits.rstrip(".")) * Fraction(10) ** int(exponent)
        return -value if sign == "-" else value
    mixed = MIXED.match(text)
    if mixed:
        sign, whole, over, under = mixed.groups()
        text = f"{sign}({whole}+{over}/{under})"
    tokens = _tokens(text)
    if tokens is None:
        return None
    try:
        return _Arithmetic(tokens).value()
    except _NotArithmetic:
        return None


def _tokens(text: str) -> list[str] | None:
    tokens: list[str] = []
    position = 0
    while position < len(text):
        token = _TOKENS.match(text, position)
        if token is None:
            return None
        tokens.append(token.group(1))
        position = token.end()
    return tokens


class _NotArithmetic(Exception):  # noqa: N818  (control flow inside this file)
    """The tokens are not arithmetic on numbers, or the result would be too large to hold."""


class _Arithmetic:
    """Recursive descent over tokens. Only mixed numbers (``2\\frac{1}{2}``) may leave their operator out."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def value(self) -> Fraction:
        result = self._sum()
        if self._at != len(self._tokens):
            raise _NotArithmetic
        return result

    def _next(self, *wanted: str) -> str | None:
        token = self._tokens[self._at] if self._at < len(self._tokens) else ""
        if not token or (wanted and token not in wanted):
            return None
        self._at += 1
        return token

    def _sum(self) -> Fraction:
        result = self._product()
        while operator := self._next("+", "-"):
            right = self._product()
            result = _bounded(result + right if operator == "+" else result - right)
        return result

    def _product(self) -> Fraction:
        result = self._signed()
        while operator := self._next("*", "/", "\\times", "\\cdot", "\\div"):
            right = self._signed()
            result = _divided(result, right) if operator in ("/", "\\div") else _bounded(result * right)
        return result

    def _signed(self) -> Fraction:
        sign = 1
        while operator := self._next("+", "-"):
            sign = -sign if operator == "-" else sign
        self._depth += 1  # here, because groups and exponents both come through
        if self._depth > _MAX_DEPTH:
            raise _NotArithmetic
        result = sign * self._power()
        self._depth -= 1
        return result

    def _power(self) -> Fraction:
        result = self._atom()
        while self._next("!"):
            if result.denominator != 1 or not 0 <= result <= 300:
                raise _NotArithmetic
            result = Fraction(math.factorial(int(result)))
        if self._next("^"):
            exponent = self._group() if self._next("{") else self._signed()
            size = max(result.numerator.bit_length(), result.denominator.bit_length(), 1)
            if exponent.denominator != 1 or abs(exponent) * size > _MAX_BITS or (not result and exponent < 0):
                raise _NotArithmetic
            result = Fraction(result ** int(exponent))
        return result

    def _atom(self) -> Fraction:
        token = self._next()
        if token == "(":
            return self._group(")")
        if token == "{":
            return self._group()
        if token in ("\\frac", "\\binom"):
            return self._pair(token)
        if token == "\\sqrt":
            return self._root()
        if token is None or not (token[0].isdigit() or token[0] == "."):
            raise _NotArithmetic
        number = Fraction(token.rstrip(".") if token[0] != "." else "0" + token)
        if token.isdigit() and self._next("\\frac"):
            fraction = self._pair("\\frac")
            if not 0 <= fraction < 1:
                raise _NotArithmetic
            return number + fraction
        return number

    def _pair(self, command: str) -> Fraction:
        groups = []
        for _ in range(2):
            if not self._next("{"):
                raise _NotArithmetic
            groups.append(self._group())
        if command == "\\frac":
            return _divided(*groups)
        n, k = groups
        if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 1000:
            raise _NotArithmetic
        return Fraction(math.comb(int(n), int(k)))

    def _root(self) -> Fraction:
        """Square roots that come out exact: ``\\sqrt{144}``."""
        if not self._next("{"):
            raise _NotArithmetic
        square = self._group()
        if square < 0:
            raise _NotArithmetic
        root = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
        if root * root != square:
            raise _NotArithmetic
        return root

    def _group(self, closing: str = "}") -> Fraction:
        result = self._sum()
        if not self._next(closing):
            raise _NotArithmetic
        return result


def _divided(left: Fraction, right: Fraction) -> Fraction:
    if not right:
        raise _NotArithmetic
    return _bounded(left / right)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 2 * _MAX_BITS:
        raise _NotArithmetic
    return value
