"""LaTeX source -> text that a person can read without a renderer. Unknown commands stay as they are.

This is for looking at a problem, not for answers: nothing is graded on this text.
"""

from __future__ import annotations

import re

__all__ = ["readable"]

_SYMBOLS = {
    "cdot": "·", "times": "×", "div": "÷", "pm": "±", "mp": "∓", "ast": "∗", "circ": "°",
    "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "ne": "≠", "neq": "≠",
    "equiv": "≡", "approx": "≈", "sim": "∼", "cong": "≅", "propto": "∝", "mid": "|", "nmid": "∤", "parallel": "∥",
    "perp": "⊥", "angle": "∠", "triangle": "△", "in": "∈", "notin": "∉", "subset": "⊂", "subseteq": "⊆", "cup": "∪",
    "cap": "∩", "setminus": "∖", "emptyset": "∅", "varnothing": "∅", "forall": "∀", "exists": "∃", "infty": "∞",
    "to": "→", "rightarrow": "→", "mapsto": "↦", "implies": "⇒", "Rightarrow": "⇒", "iff": "⇔", "Leftrightarrow": "⇔",
    "sum": "∑", "prod": "∏", "int": "∫", "partial": "∂", "nabla": "∇", "ldots": "…", "cdots": "⋯", "dots": "…",
    "vdots": "⋮", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "langle": "⟨", "rangle": "⟩", "land": "∧",
    "lor": "∨", "neg": "¬", "oplus": "⊕", "otimes": "⊗", "star": "⋆", "prime": "′", "ell": "ℓ", "deg": "deg",
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "varepsilon": "ε", "zeta": "ζ", "eta": "η",
    "theta": "θ", "kappa": "κ", "lambda": "λ", "mu": "μ", "nu": "ν", "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ",
    "tau": "τ", "phi": "φ", "varphi": "φ", "chi": "χ", "psi": "ψ", "omega": "ω", "Gamma": "Γ", "Delta": "Δ",
    "Theta": "Θ", "Lambda": "Λ", "Sigma": "Σ", "Phi": "Φ", "Psi": "Ψ", "Omega": "Ω", "quad": " ", "qquad": "  ",
    "left": "", "right": "", "displaystyle": "", "limits": "", "big": "", "Big": "", "bigl": "", "bigr": "",
    "sin": "sin", "cos": "cos", "tan": "tan", "log": "log", "ln": "ln", "gcd": "gcd", "max": "max", "min": "min",
    "bmod": "mod", "lim": "lim",
}  # fmt: skip
_SETS = {"N": "ℕ", "Z": "ℤ", "Q": "ℚ", "R": "ℝ", "C": "ℂ"}
_GROUP = r"\{([^{}]*)\}"
_COMMAND = re.compile(r"\\([A-Za-z]+)(?: (?=\S))?")
_FONTS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname|mbox|boldsymbol)\s*" + _GROUP)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:" + _GROUP + r"\s*" + _GROUP + r"|(\d)\s*(\d))")
_ROOT = re.compile(r"\\sqrt\s*(?:\[([^\[\]{}]*)\]\s*)?" + _GROUP)
_BINOMIAL = re.compile(r"\\[dt]?binom\s*" + _GROUP + r"\s*" + _GROUP)
_DELIMITERS = re.compile(r"\\[()\[\]]|(?<!\\)\$\$?")
_SPACING = re.compile(r"\\[,;:! ]")
_SCRIPT = re.compile(r"([_^])(?:\{([^{}]*)\}|(\d)(?!\d))|(?<=[A-Za-z])(_)([ijkmn])(?![A-Za-z])")
_SMALL = {
    "^": str.maketrans("0123456789+-=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ"),
    "_": str.maketrans("0123456789+-=()aijkmn", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐᵢⱼₖₘₙ"),
}
_NESTED = 8
_FACTOR = re.compile(r"[\w(^!⁻⁽√∛∜]|\\(?:[dt]?frac|[dt]?binom|sqrt|left|bigl?|Big|mathbb|mathrm|text)(?![A-Za-z])")
_LETTER = re.compile(r"\\([A-Za-z]+)")


def readable(source: str) -> str:
    r"""``$\frac{x+1}{2} \le \sqrt{3}$`` -> ``(x+1)/2 ≤ √3``."""
    text = re.sub(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", "°", source.replace("\\\\", "\n"))
    for _ in range(_NESTED):  # from the innermost group outwards
        before = text
        text = _FONTS.sub(r"\1", text)
        text = re.sub(r"\\mathbb\s*(?:\{([NZQRC])\}|([NZQRC]))", lambda m: _SETS[m[1] or m[2]], text)
        text = _SCRIPT.sub(_script, text)
        text = _FRACTION.sub(_fraction, text)
        text = _BINOMIAL.sub(r"C(\1, \2)", text)
        text = _ROOT.sub(_root, text)
        if text == before:
            break
    text = re.sub(r"\\pmod\s*" + _GROUP, r"(mod \1)", text)
    text = _COMMAND.sub(lambda m: _symbol(m), text)
    text = _SPACING.sub(" ", _DELIMITERS.sub("", text))
    return re.sub(r"\\([{}$%#&_])", r"\1", text).strip()


def _atom(text: str) -> str:
    return text if re.fullmatch(r"\w*|\\[A-Za-z]+", text.strip()) else f"({text})"


def _script(match: re.Match[str]) -> str:
    sign, body = match[1] or match[4], match[3] or match[5] or (match[2] or "").replace(" ", "")
    table = _SMALL[sign]
    if all(ord(letter) in table for letter in body):
        return body.translate(table)
    return sign + (body if len(body) == 1 else f"({match[2]})")


def _fraction(match: re.Match[str]) -> str:
    above, below = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
    text = f"{_atom(above)}/{_atom(below)}"
    if _goes_on(match):
        text = f"({text})"
    # 3 1/2 is not 31/2.
    return f" {text}" if text[0].isalnum() and _stands_behind(match) else text


def _root(match: re.Match[str]) -> str:
    degree, inside = match[1], _atom(match[2])
    if _goes_on(match) and not inside.startswith("("):
        inside = f"({inside})"
    sign = {None: "√", "3": "∛", "4": "∜"}.get(degree)
    if sign is None:  # the fifth root of 3 is not 5√3, and twice it is not 2⁵√3
        sign = ("·" if _stands_behind(match) else "") + _raised(str(degree)) + "√"
    return sign + inside


def _raised(text: str) -> str:
    table = _SMALL["^"]
    return text.translate(table) if all(ord(letter) in table for letter in text) else f"^({text})"


def _stands_behind(match: re.Match[str]) -> bool:
    """Something stands before it that its first sign would be read with."""
    return match.string[: match.start()][-1:].isalnum()


def _goes_on(match: re.Match[str]) -> bool:
    """What follows it would be read into its last part: 1/2x, √2³."""
    if _FACTOR.match(match.string, match.end()):
        return True
    command = _LETTER.match(match.string, match.end())
    return command is not None and _SYMBOLS.get(command[1], "").isalpha()


def _symbol(match: re.Match[str]) -> str:
    symbol = _SYMBOLS.get(match[1])
    if symbol is None:
        return match[0]
    # The blank that ended the command's name goes with a bracket, and stays beside an operator.
    return symbol + (" " if match[0].endswith(" ") and symbol else "")
