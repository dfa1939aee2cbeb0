"""One spelling per answer: LaTeX clutter removed. Pure text work, no symbolic algebra."""

from __future__ import annotations

import re

from trtkit.solve.arithmetic import MAX_CHARACTERS, MIXED, exact_value

__all__ = ["canonical_text", "last_side", "split_modulo"]

_UNICODE = str.maketrans(
    {"\u2212": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u2044": "/", "\u00b0": "", "\u03c0": "\\pi "}
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
)
_WRAPPER = r"(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname)"
_WHOLE_WRAPPER = re.compile(rf"\\{_WRAPPER}\s*\{{([^{{}}]*)\}}")
# Only around the whole answer: 10^{\underline{3}} is 720.
_WHOLE_STYLE = re.compile(r"\\(?:underline|emph|boldsymbol|bm|mathtt|texttt)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_UNIT = re.compile(rf"(?<=[^\s_^{{]) *\\{_WRAPPER}\s*\{{[^{{}}]*\}}(?:\^\{{?[23]\}}?)?$")
_LEADING_WORDS = re.compile(rf"^\\{_WRAPPER}\s*\{{[^{{}}]*\}}")
_PLAIN_UNIT = re.compile(r"(?<=[0-9}]) +(?:(?:square |cubic )?[a-z]{3,}|cm|mm|km|m|kg|g|s|h)(?:\^\{?[23]\}?)?$")
_ASSIGNED = re.compile(r"^[A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))? *= *(?=[^ ])")
_DECIMAL = re.compile(r"^([-+]?[0-9]+) ?_ ?(?:10|\{ ?10 ?\}|\{ ?\\text\{ten\} ?\})$")
_MODULO = re.compile(r"\(?\\[bp]?mod(?![a-z])")
_GROUPED = re.compile(r"^[-+]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]*)?$")
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\!\s*", ""),  # before spaces: 11,\! 111 is one number, 11, 111 are two
        (r"\{\\?,\}", ","),
        (r"(?<!\\)\\(?:,|;|:| |quad\b|qquad\b|hspace\{[^{}]*\})|~", " "),
        (r"\\(?:left|right)(?![a-z])|\\(?:displaystyle|limits|bigl?|bigr|Bigl?|Bigr|bf|[lL]arge|huge)(?![A-Za-z])", ""),
        (r"\\(?:text)?color\s*\{[A-Za-z]+\}", ""),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\[dt]binom(?![a-z])", r"\\binom"),
        (r"\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\degree(?![a-z])", ""),
        (r"\\?%", ""),
        (r"^\s*(?:\\\$|\$|\u20ac|\u00a3)", ""),
        (r"(?:\\le|\\ge)q(?![a-z])", lambda match: match.group()[:-1]),
        (r"\\begin\{[bpBvV]?matrix\}", r"\\begin{pmatrix}"),
        (r"\\end\{[bpBvV]?matrix\}", r"\\end{pmatrix}"),
        (r"\\text\s*\{\s*\(\s*mod\s*([0-9]+)\s*\)\s*\}", r"\\pmod{\1}"),
        (r"\\(?:text|mathrm|operatorname)\s*\{\s*mod\s*\}|(?<![A-Za-z\\])mod(?![A-Za-z])", r"\\bmod "),
        (r"\s+", " "),
    )
)
_TIGHT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Only a space between two names or numbers means something.
        (r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ", ""),
        (r"\\frac([0-9A-Za-z])([0-9A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac (?=[0-9])([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac(\{[^{}]*\})([0-9A-Za-z])", r"\\frac\1{\2}"),
        (r"\\frac ?([0-9])(\{)", r"\\frac{\1}\2"),
        (r"\\sqrt ?([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"\{([^{}])\}(?<=[_^]\{.\})", r"\1"),
    )
)


def canonical_text(text: str) -> str:
    """The answer without what does not change it: dollar signs, text wrappers, units, spaces, ``x =``."""
    if len(text) > MAX_CHARACTERS:
        return " ".join(text.split())
    text = _unwrapped(text.translate(_UNICODE).strip())
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _trimmed(text)
    text = _UNIT.sub("", text)
    text = _unwrapped(_trimmed(_PLAIN_UNIT.sub("", text)))
    if text.count("=") == 1:
        text = _unwrapped(_trimmed(_ASSIGNED.sub("", text)))
    text = _DECIMAL.sub(r"\1", text)
    head = re.split(r"\\approx(?![a-z])", text)[0].strip()
    if head and len(head) > 1:
        text = head
    if _GROUPED.match(text):
        return text.replace(",", "").replace(" ", "")
    bare = _LEADING_WORDS.sub("", text).strip()
    if bare != text and exact_value(bare) is not None:
        text = bare
    if MIXED.match(text):  # its space is the only thing that tells 1 1/2 from 11/2
        return text
    if re.fullmatch(r"[A-Za-z][A-Za-z' -]+", text):
        return text.casefold()
    for pattern, replacement in _TIGHT:
        text = pattern.sub(replacement, text)
    option = re.fullmatch(r"\(?([A-Z])\)?", text)
    return option.group(1) if option else text


def last_side(text: str) -> str:
    """What follows the last ``=`` or ``\\equiv``, where that is one answer."""
    if re.search(r"[,;]|\\text", text):  # p = 5, q = 2 are two answers
        return text
    return re.split(r"=|\\equiv(?![a-z])", text)[-1].strip()


def split_modulo(text: str) -> tuple[str, str | None]:
    """What stands before ``\\bmod`` or ``\\pmod``, and the modulus; None where there is none."""
    found = _MODULO.search(text)
    if found is None:
        return text, None
    modulus = text[found.end() :]
    return text[: found.start()].strip(), modulus.removesuffix(")") if found.group()[0] == "(" else modulus


def _unwrapped(text: str) -> str:
    """Without what encloses the whole text: ``$..$``, ``\\(..\\)``, ``\\text{..}``, ``\\boxed{..}``."""
    while True:
        before = text
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
                text = text[len(opening) : -len(closing)].strip()
        whole = _WHOLE_WRAPPER.fullmatch(text) or _WHOLE_STYLE.fullmatch(text)
        whole = whole or re.fullmatch(r"\\(?:boxed|fbox)\s*\{(.*)\}", text)
        text = whole.group(1).strip() if whole else text
        if text == before:
            return text


def _trimmed(text: str) -> str:
    text = text.strip()
    if text.endswith("..."):
        return text
    # The inner run is possessive: split in every way, rows of empty \\ would take for ever.
    return re.sub(r"(?:(?<![.])\.|,|;|\\++(?![A-Za-z{}|])|\s)+$", "", text)
