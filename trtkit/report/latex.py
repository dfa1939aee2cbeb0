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


def readable(source: str) -> str:
    r"""``$\frac{x+1}{2} \le \sqrt{3}$`` -> ``(x+1)/2 ≤ √3``."""
    text = re.sub(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", "°", source.replace("\\\\", "\n"))
    for _ in range(_NESTED):  # from the innermost group outwards
        before = text
        text = _FONTS.sub(r"\1", text)
        text = re.sub(r"\\mathbb\s*(?:\{([NZQRC])\}|([NZQRC]))", lambda m: _SETS[m[1] or m[2]], text)
        text = _SCRIPT.sub(_script, text)
        text = _FRACTION.sub(lambda m: f"{_atom(m[1] or m[3])}/{_atom(m[2] or m[4])}", text)
        text = _BINOMIAL.sub(r"C(\1, \2)", text)
        text = _ROOT.sub(lambda m: f"{_root(m[1])}{_atom(m[2])}", text)
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


def _root(degree: str | None) -> str:
    return {None: "√", "3": "∛", "4": "∜"}.get(degree, f"{degree}√")


def _symbol(match: re.Match[str]) -> str:
    symbol = _SYMBOLS.get(match[1])
    if symbol is None:
        return match[0]
    # The blank that ended the command's name goes with a bracket, and stays beside an operator.
    return symbol + (" " if match[0].endswith(" ") and symbol else "")
