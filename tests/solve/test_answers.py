from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.errors import UsageError
from trtkit.solve.answers import AnswerMode, extract_box, read_answer
from trtkit.solve.arithmetic import exact_value
from trtkit.solve.canonical import canonical_text

AUTO = AnswerMode()
AIMO = AnswerMode(kind="integer", modulus=1000)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("no box", None),
        ("\\boxed{42}", "42"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed {x}", "x"),
        ("so \\boxed 5.", "5"),
        ("so \\boxed -17, which", "-17"),
        ("\\fbox{3}", "3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{1, 2\\right.}", "\\left\\{1, 2\\right."),
        ("\\boxed{7} but \\boxed{12 and so", "7"),  # cut off at the token limit
        ("\\boxed{7} \\boxed{ {3 }", "7"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{5} as in \\boxed{}", "5"),
        ("\\boxed{5}, put it in \\boxed{answer}", "5"),
        ("\\boxed{5} \\boxed{\\text{your answer}} \\boxed{...}", "5"),
        ("\\boxed{  }", None),
        ("\\boxed{5} goes into \\boxed{\\quad} or \\boxed{\\hspace{2cm}}", "5"),
        ("\\boxed{5} \\boxed{\\,} \\boxed{~} \\boxed{\\ } \\boxed{$$} \\boxed{{}} \\boxed{\\boxed{}}", "5"),
        ("\\boxed{5} \\boxed{\\square} \\boxed{\\underline{\\phantom{10}}} \\boxed{\\_\\_}", "5"),
        ("\\boxed{5} \\boxed{\\{\\}}", "\\{\\}"),
        ("\\boxed{\\quad 5\\square}", "\\quad 5\\square"),
        ("\\boxedx{3}", None),
        ("\\\\boxed{\\\\frac{1}{2}}", "\\frac{1}{2}"),  # escaped twice
        ("\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("\\boxed{1}</think>so \\boxed{2}", "2"),
        ("\\boxed{1}</think>nothing", "1"),
        ("\\boxed{1}</think>", "1"),
        ("\\boxed{1}</think>\\boxed{2", "1"),
        ("\\boxed{0}", "0"),
        ("\\boxed\n{8}", "8"),
    ],
)
def test_extract_box(text: str, box: str | None) -> None:
    assert extract_box(text) == box


balanced = st.recursive(
    st.text(st.sampled_from("ab1 +\\frac"), max_size=6).map(lambda text: text.replace("\\", "")),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=8,
)


@given(st.lists(balanced, min_size=1, max_size=4), st.lists(balanced, max_size=3))
def test_any_balanced_content_is_found_whole(content: list[str], noise: list[str]) -> None:
    inside = "x" + "".join(content)
    text = "".join(noise) + "\\boxed{9}" + "".join(noise) + "\\boxed{" + inside + "}" + "".join(noise)
    assert extract_box(text) == inside.strip()


@given(st.text(st.sampled_from("\\boxed{}x1 "), max_size=60))
def test_extraction_never_fails_and_returns_balanced_text(text: str) -> None:
    box = extract_box(text)
    if box is not None:
        assert box.strip()
        plain = box.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        assert plain.count("{") == plain.count("}")


def test_extraction_is_linear() -> None:
    began = time.monotonic()
    assert extract_box("\\boxed{" * 50_000) is None
    assert extract_box("{" * 200_000 + "\\boxed{1}") == "1"
    assert time.monotonic() - began < 3


NUMBERS = [
    ("0", "0"),
    ("-0", "0"),
    ("073", "73"),
    ("1{,}234", "1234"),
    ("1\\,234", "1234"),
    ("1\\ 234", "1234"),
    ("1,234", "1234"),
    ("1 234", "1234"),
    ("12,345,678", "12345678"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
    ("42.0", "42"),
    ("42.", "42"),
    ("4.2e1", "42"),
    ("4.2 \\times 10^{1}", "42"),
    ("-5", "-5"),
    ("\u22125", "-5"),
    ("+5", "5"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("90\u00b0", "90"),
    ("50\\%", "50"),
    ("50%", "50"),
    ("\\$10", "10"),
    ("10\\text{ units}", "10"),
    ("10 \\mathrm{~cm}^2", "10"),
    ("10 cm", "10"),
    ("10 apples", "10"),
    ("17\\text{ any text}", "17"),
    ("\\text{The answer is } 42", "42"),
    ("\\text{42}", "42"),
    ("$42$", "42"),
    ("\\(42\\)", "42"),
    ("\\boxed{42}", "42"),
    ("x = 42", "42"),
    ("a_{10} = 42", "42"),
    ("f(x) = 42", "42"),
    ("185\\", "185"),
    ("\\frac{84}{2}", "42"),
    ("\\dfrac{84}{2}", "42"),
    ("84/2", "42"),
    ("\\frac12", "1/2"),
    ("\\frac {1}{2}", "1/2"),
    ("\\frac1{20}", "1/20"),
    ("-\\frac{3}{8}", "-3/8"),
    ("\\frac{-3}{8}", "-3/8"),
    ("918\\frac{1}{2}", "1837/2"),
    ("-1\\frac{1}{2}", "-3/2"),
    ("1 1/2", "3/2"),
    ("3.14", "157/50"),
    (".185", "37/200"),
    ("0.50", "1/2"),
    ("2^{10}", "1024"),
    ("2^10", "1024"),
    ("2^{-1}", "1/2"),
    ("-2^2", "-4"),
    ("\\binom{6}{3}", "20"),
    ("5!", "120"),
    ("\\sqrt{144}", "12"),
    ("2 \\cdot 3 + 4", "10"),
    ("(1+2)*3", "9"),
]


@pytest.mark.parametrize(("text", "key"), NUMBERS)
def test_numbers_are_exact(text: str, key: str) -> None:
    answer = read_answer(text, AUTO)
    assert answer is not None
    assert (answer.key, answer.value, answer.raw) == (key, Fraction(key), text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1,2",
        "10,20",
        "1, 234",
        "(3, 4)",
        "1 2",
        "4210_5",
        "4210_{5}",
        "3 \\pm 1",
        "1/0",
        "\\frac{1}{0}",
        "0^{-1}",
        "2\\pi",
        "2x",
        "\\sqrt{2}",
        "\\sqrt{-4}",
        "2(3)",
        "1..2",
        "--",
        "{",
        "}{",
        "\\frac{1}",
        "\\binom{3}{6}",
        "10^{10^{10}}",
        "2^" * 499 + "2",
        "\\begin{cases} x" + "\\\\" * 11 + "y \\end{cases}",
        "9!!!!!!",
        "(((1",
        "(" * 400 + "1" + ")" * 400,
        "9" * 100_000,
        "2^{0.5}",
        "1_000",
        "\u0661",
    ],
)
def test_what_is_no_number_is_none_and_quick(text: str) -> None:
    began = time.monotonic()
    assert exact_value(canonical_text(text)) is None
    assert time.monotonic() - began < 0.5


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**6))
def test_fractions_read_back(over: int, under: int) -> None:
    value = Fraction(over, under)
    for text in (f"\\frac{{{over}}}{{{under}}}", f"{over}/{under}", f"x = \\dfrac{{{over}}}{{{under}}}."):
        answer = read_answer(text, AUTO)
        assert answer is not None
        assert answer.value == value


@given(st.text(st.sampled_from("\\frac{}()^!*/+-. ,_=$%0123456789xtes"), max_size=40))
def test_reading_never_fails_and_is_stable(text: str) -> None:
    answer = read_answer(text, AUTO)
    if answer is not None:
        again = canonical_text(answer.key)
        value = exact_value(again)
        assert answer.value is None or value == answer.value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\left(2, \\infty\\right)", "(2,\\infty)"),
        ("\\text{Evelyn}", "evelyn"),
        ("\\text{(C)}", "C"),
        ("(C)", "\\textbf{C}"),
        ("\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("\\frac{\\sqrt{3}}{3} \\approx 0.577", "\\dfrac{\\sqrt{3}}{3}"),
        ("2\\sqrt{5}\\text{ cm}", "2\\sqrt5"),
        ("4210_{5}", "4210_5"),
        ("y = 2x + 1", "2x+1"),
        ("x \\leq 3", "x \\le 3"),
    ],
)
def test_one_spelling(one: str, other: str) -> None:
    assert canonical_text(one) == canonical_text(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12", "1 2"),
        ("x", "X"),
        ("x=1, y=2", "y=2"),
        ("A", "a"),
        ("\\text{odd}", "\\text{oddd}"),
        ("4210_5", "4210"),
    ],
)
def test_different_stays_different(one: str, other: str) -> None:
    assert canonical_text(one) != canonical_text(other)


@pytest.mark.parametrize(
    ("box", "key"),
    [
        ("0", "0"),
        ("073", "73"),
        ("42.0", "42"),
        ("12345", "345"),
        ("1000", "0"),
        ("-5", "-5"),  # kept: whether it means 995 is not ours to guess
        ("2^{10}", "24"),
        ("m + n = 128", "128"),
        ("2^{10} \\equiv 24 \\pmod{1000}", "24"),
        ("5 \\bmod 1000", "5"),
        ("5 mod 1000", "5"),
        ("24 \\;(\\text{mod}\\;1000)", "24"),
        ("24 \\text{ (mod 1000)}", "24"),
        ("2^{10} \\bmod 7", "2"),  # not 1024
        ("-5 \\bmod 1000", "995"),
        ("5 \\pmod p", None),
        ("x \\equiv 3 \\pmod 7, x \\equiv 2 \\pmod 5", None),
        ("\\underline{336}", "336"),
        ("N = \\underline{\\textbf{336}}", "336"),
        ("10^{\\underline{3}}", None),  # a falling power
        ("\\boldsymbol{336}", "336"),
        ("\\textcolor{red}{336}", "336"),
        ("{\\color{red} 336}", "336"),
        ("336_{10}", "336"),
        ("336_{8}", None),
        ("336 square units", "336"),
        ("336 or 337", None),
        ("1/2", None),
        ("3.14", None),
        ("p=5,q=2", None),
        ("x", None),
        ("", None),
        (None, None),
    ],
)
def test_integer_mode(box: str | None, key: str | None) -> None:
    answer = read_answer(box, AIMO)
    assert (answer and answer.key) == key
    assert answer is None or answer.raw == box


@pytest.mark.parametrize("box", [" ", "\\%", ",", "\\quad", "\\boxed{}"])
def test_nothing_is_no_answer(box: str) -> None:
    assert read_answer(box, AUTO) is None


def test_modes_that_make_no_sense() -> None:
    for make in (
        lambda: AnswerMode(modulus=1000),
        lambda: AnswerMode(kind="integer", modulus=0),
        lambda: AnswerMode(kind="float"),
    ):
        with pytest.raises(UsageError):
            make()
