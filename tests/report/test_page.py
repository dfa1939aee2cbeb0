from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.run_dirs import attempt, solution, write_run
from trtkit.report.page import document, html, markdown, report_on

EVIL = """</script><script>alert(1)</script><img src=x onerror=a(2)>"'`|<!-- {{ 12347*3 }} [x](javascript:alert(3))"""
PROBLEMS = [{"id": name, "problem": "x", "answer": "7"} for name in ("a", "b", "c")]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what is in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def run_dir(directory: Path, right: int, **arguments: object) -> Path:
    """A run that has ``right`` of three problems right."""
    rows = []
    for place, problem in enumerate(PROBLEMS):
        box = "7" if place < right else "8"
        rows += [attempt(problem["id"], 0, box, clock=1.0 + place), solution(problem["id"], box, clock=1.0 + place)]
    return write_run(directory, PROBLEMS, rows, **arguments)


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    problems = [{"id": EVIL, "problem": EVIL, "answer": EVIL}]
    rows = [
        attempt(EVIL, 0, EVIL, variant=EVIL, ending=EVIL),
        attempt(EVIL, 1, "7", variant=EVIL),
        solution(EVIL, EVIL, stopped_early=EVIL, error=EVIL),
    ]
    directory = write_run(tmp_path / "<script>alert(4)<!--\"'", problems, rows, prompt=EVIL, more={EVIL: EVIL})
    report = report_on([directory])
    page = Page(html(report))
    assert page.tags.count("script") == 1
    assert not {"img", "a", "iframe", "object", "link", "style"} & (set(page.tags) - {"style"})
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [value for name, value in page.attributes if name in ("href", "src", "style")]
    assert "37041" not in page.words  # no template inside a template
    assert "<img src=x onerror=a(2)>" in page.words  # it is shown, as text
    for line in markdown(report).splitlines():
        assert not re.search(r"(?<!\\)<(?:script|img|!--)|(?<!\\)\]\(javascript", line)


def test_the_page_needs_nothing_else_and_lets_only_its_own_script_run(tmp_path: Path) -> None:
    text = html(report_on([run_dir(tmp_path / "one", 2)]))
    assert "http://" not in text
    assert "https://" not in text
    (policy,) = (value for name, value in Page(text).attributes if name == "content" and "default-src" in value)
    for kind in ("script", "style"):
        (inside,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_a_single_run_is_told_in_words(tmp_path: Path) -> None:
    page = Page(html(report_on([run_dir(tmp_path / "one", 2)])))
    assert "2 of 3 problems right (66.7%)" in page.words
    assert "must not be compared" not in page.words
    assert page.tags.count("tbody") >= 3


def test_runs_with_the_same_budget_are_compared(tmp_path: Path) -> None:
    runs = [run_dir(tmp_path / "one", 1, seed=0), run_dir(tmp_path / "two", 3, seed=1)]
    report = report_on(runs)
    for words in (Page(html(report)).words, markdown(report)):
        assert "must not be compared" not in words
        assert "+66.7 ± 33.3 points" in words
    said = document(report)
    assert said["comparable"] is True
    assert [(one["accuracy"], one["maj_at"], one["tokens"], one["seconds"]) for one in said["runs"]] == [
        (pytest.approx(1 / 3, abs=1e-6), [pytest.approx(1 / 3, abs=1e-6)], 30, 3.0),
        (1.0, [1.0], 30, 3.0),
    ]
    assert [(one["accuracy_error"], one["tokens_per_second"]) for one in said["runs"]] == [
        (pytest.approx(1 / 3, abs=1e-6), 10.0),
        (0.0, 10.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"samples": 8}, "samples per problem"),
        ({"max_tokens": 99}, "max tokens per sample"),
        ({"time_limit": 60.0}, "time limit"),
    ],
)
def test_runs_with_other_budgets_are_not(tmp_path: Path, arguments: dict[str, object], name: str) -> None:
    report = report_on([run_dir(tmp_path / "one", 1), run_dir(tmp_path / "two", 3, **arguments)])
    for words in (Page(html(report)).words, markdown(report)):
        assert "must not be compared" in words
        assert name in words
        assert "points" not in words
        assert words.count("(not comparable between these runs)") == 1, "of the answers"
    assert set(document(report)["differences"]) == {name}


def test_the_majority_curve_begins_at_one_sample_and_has_its_error_as_a_band(tmp_path: Path) -> None:
    rows = [attempt(name, index, "7" if name == "a" else "8") for name in "abc" for index in (0, 1)]
    rows += [solution(name, "7" if name == "a" else "8") for name in "abc"]
    text = html(report_on([write_run(tmp_path / "run", PROBLEMS, rows)]))
    assert re.findall(r"<title>run: (\d) k, samples in the vote, ([\d.]+%)</title>", text) == [
        ("1", "33.3%"),
        ("2", "33.3%"),
    ]
    [band] = re.findall(r'<polygon [^>]*points="([^"]*)"', text)
    heights = [float(point.split(",")[1]) for point in band.split()]
    [bottom, top] = (float(at) for at in re.findall(r'y="([\d.]+)" text-anchor="end">(?:0%|100%)<', text))
    assert (max(heights) - min(heights)) / (bottom - top) == pytest.approx(2 / 3, abs=0.01)  # 33.3% above and below


def test_runs_with_more_and_fewer_finished_samples_share_a_table(tmp_path: Path) -> None:
    runs = []
    for name, count in (("one", 1), ("two", 2)):
        rows = [attempt("a", index, "7") for index in range(count)]
        runs.append(write_run(tmp_path / name, PROBLEMS[:1], [*rows, solution("a", "7", cancelled=4 - count)]))
    text = markdown(report_on(runs))
    assert "| 1 | 100.0% | 100.0% |\n| 2 | - | 100.0% |\n" in text


def test_other_problems_are_another_budget_and_other_rows(tmp_path: Path) -> None:
    first = run_dir(tmp_path / "one" / "run", 1)
    second = write_run(
        tmp_path / "two" / "run",
        [{"id": "a", "problem": "y", "answer": "7"}],
        [attempt("a", 0, "7"), solution("a", "7")],
    )
    report = report_on([first, second])
    assert {item.name for item in report.comparison.budgets} == {"problems", "problems settled"}
    assert [(row.id, len(row.lines)) for row in report.rows] == [("a", 1), ("b", 1), ("c", 1), ("a", 1)]


@pytest.mark.parametrize("lost", ["one", "two"])
def test_a_problem_is_one_row_though_only_one_run_still_finds_its_text(tmp_path: Path, lost: str) -> None:
    runs = [run_dir(tmp_path / name / "run", 1) for name in ("one", "two")]
    (tmp_path / lost / "problems.jsonl").unlink()
    report = report_on(runs)
    assert report.comparison.comparable
    assert [(row.id, row.text, len(row.lines)) for row in report.rows] == [(name, "x", 2) for name in "abc"]


def test_a_known_answer_that_was_corrected_is_not_shown_for_both_runs(tmp_path: Path) -> None:
    runs = []
    for name, gold in (("one", "7"), ("two", "8"), ("three", None)):
        problems = [{"id": "a", "problem": "x", "answer": gold} if gold else {"id": "a", "problem": "x"}]
        runs.append(write_run(tmp_path / name / "run", problems, [attempt("a", 0, "8"), solution("a", "8")]))
    shown = [(row.gold, [(line.run, line.state) for line in row.lines]) for row in report_on(runs).rows]
    assert shown == [("7", [("one/run", "wrong"), ("three/run", "unknown")]), ("8", [("two/run", "right")])]


def test_the_time_bank_at_the_end_is_what_the_last_record_says(tmp_path: Path) -> None:
    rows = [solution(name, "7", bank=bank, share=1.0, clock=5.0) for name, bank in (("c", 1.0), ("a", 9.0), ("b", 4.0))]
    report = report_on([write_run(tmp_path / "run", PROBLEMS, rows)])  # one step settled them all
    assert document(report)["runs"][0]["bank_seconds"] == 4.0


def test_time_is_shown_against_its_share_and_ends_are_counted(tmp_path: Path) -> None:
    rows = [
        attempt("a", 0, "7", ending="length", finish="length", forced=True),
        attempt("a", 1, None, ending="loop"),
        solution("a", "7", seconds=3.0, used=2.0, share=4.0, bank=9.0, cancelled=2, stopped_early="beta(0.95)"),
    ]
    report = report_on([write_run(tmp_path / "run", PROBLEMS[:1], rows, time_limit=60.0)])
    (line,) = report.rows[0].lines
    assert line.time == "2.0 s of 4.0 s"
    assert (line.time_width, line.share_at) == (50.0, 100.0)
    assert line.flags == ("1 forced", "1 looped", "2 cancelled", "ended by beta(0.95)")
    assert [(bar.kind, bar.x, bar.width) for bar in line.bars] == [
        ("right", 0.0, 25.0),
        ("blank", 25.0, 25.0),
        ("cancelled", 50.0, 50.0),
    ]
    text = html(report)
    assert "Time bank at the end" in Page(text).words
    assert "forced to answer, token budget" in Page(text).words
    drawn = re.findall(r'<rect class="(\w+)" x="([\d.]+)%" width="([\d.]+)%"', text)
    assert drawn == [("right", "0.0", "25.0"), ("blank", "25.0", "25.0"), ("cancelled", "50.0", "50.0")]


def test_runs_in_which_nothing_happened_have_a_page(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", PROBLEMS, [])
    (tmp_path / "gone").mkdir()
    gone = write_run(tmp_path / "gone" / "run", PROBLEMS, [])
    (tmp_path / "gone" / "problems.jsonl").unlink()
    assert "not settled" in Page(html(report_on([empty]))).words
    words = Page(html(report_on([gone]))).words
    assert "no sample has finished" in words
    assert "not found from this directory" in words
    assert markdown(report_on([empty, gone]))


def test_no_figure_is_broken_across_lines(tmp_path: Path) -> None:
    report = report_on([run_dir(tmp_path / "one", 2)])
    page = html(report)
    cells = re.findall(r"<td>([^<]*\([^<]*\)[^<]*)</td>", page)
    assert any("(k\u00a0=\u00a0" in cell for cell in cells)
    assert not [cell for cell in cells if re.search(r"\([^)]* [^)]*\)", cell)]
    assert "66.7%\u00a0±\u00a033.3\u00a0" not in page  # but before its parentheses it may be
    assert "66.7%\u00a0±\u00a033.3 (2\u00a0of\u00a03)" in page
    assert " in 3.0\u00a0s, with" in page
    assert "\u00a0" not in markdown(report)


def test_the_error_is_explained_where_there_is_one(tmp_path: Path) -> None:
    said = "± is one standard error"
    known = report_on([run_dir(tmp_path / "known", 2)])
    unknown = [{"id": "a", "problem": "x"}]
    rows = [attempt("a", 0, "7"), solution("a", "7")]
    other = report_on([write_run(tmp_path / "unknown" / "run", unknown, rows)])
    assert said in html(known)
    assert said in markdown(known)
    assert "±" not in html(other)
    assert "±" not in markdown(other)
