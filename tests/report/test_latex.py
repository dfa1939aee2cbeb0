from __future__ import annotations

import pytest

from trtkit.report.latex import readable


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"Find $\frac{x+1}{2} \le \sqrt{3}$.", "Find (x+1)/2 ≤ √3."),
        (r"\(2^{10} \cdot 3\) and \[a \neq b\]", "2¹⁰ · 3 and a ≠ b"),
        (r"$\frac{1}{\sqrt[3]{x}}$", "1/(∛x)"),
        (r"$60^\circ$, $n \in \mathbb{Z}$, $\binom{n}{k}$", "60°, n ∈ ℤ, C(n, k)"),
        (r"cost \$5 and 3\% of $\text{all apples}$", "cost $5 and 3% of all apples"),
        (r"$a_{i+1}^{2} + a_i x_1^{ab} = 2^n$, 3^10", "aᵢ₊₁² + aᵢ x₁^(ab) = 2^n, 3^10"),
        (r"$3\frac{1}{2}$, $1\frac34$, $2\frac{x+1}{3}$", "3 1/2, 1 3/4, 2(x+1)/3"),
        (r"$\frac{1}{2}x$, $\frac{1}{2}\pi r$, $\frac{a}{b}^2$", "(1/2)x, (1/2)π r, (a/b)²"),
        (r"$\frac{1}{2}\le x$ and $\left(\frac{1}{2}\right)^{3}$", "1/2≤ x and (1/2)³"),
        (r"$\sqrt{2}3$, $\sqrt{\pi}x$, $\sqrt{x+1}y$", "√(2)3, √(π)x, √(x+1)y"),
        (r"$\sqrt[5]{3}$, $2\sqrt[n]{x}$, $\sqrt[a]{2}$", "⁵√3, 2·ⁿ√x, ^(a)√2"),
        (r"\unknown{x} stays", r"\unknown{x} stays"),
        ("plain text, 5 < 6 & more", "plain text, 5 < 6 & more"),
        (r"$\frac{1", r"\frac{1"),
    ],
)
def test_readable(source: str, text: str) -> None:
    assert readable(source) == text
