"""``trtkit revote``: what other stop rules would have answered on saved samples, and at what cost."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtkit.cli.options import Json, refuse_idle
from trtkit.cli.output import finish, notice, table
from trtkit.errors import UsageError
from trtkit.log import Progress, logger

if TYPE_CHECKING:
    from trtkit.solve.answers import AnswerMode
    from trtkit.solve.traces import Traces
    from trtkit.solve.tradeoff import Interval, ReplayOptions, Saved, Tradeoff

_RULES = ("full", "unassailable", "agree(4)", "beta(0.95)", "beta(0.95)+stragglers(2)", "ladder", "certificate(0.05)")
_WORTH = 0.005
"""The rule that the last line suggests loses at most this much accuracy."""


def command(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_OR_TRACES", help="Run directories, journal.jsonl, or JSONL files of traces."),
    ],
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rules",
            help="full, or stop rules joined by '+', and probe(EVERY,TIMES): 'beta(0.95)+stragglers(2)'. Repeatable.",
        ),
    ] = None,
    samples: Annotated[
        str | None, typer.Option("--samples", "-n", help="Samples per problem, e.g. 8,16,32; default: what is there.")
    ] = None,
    finish_order: Annotated[
        str, typer.Option("--finish-order", help="Samples arrive by length (one batch in lockstep) or as recorded.")
    ] = "length",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="By length: rows in flight; default: all.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--fields", help="Columns of a trace file: text=...,gold=...,problem=...,tokens=...,seconds=..."),
    ] = None,
    problems: Annotated[
        Path | None, typer.Option("--problems", help="Problems file with the gold answers of a run.")
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", help="majority, finish, length or confidence; '+damped' weighs guesses less.")
    ] = "majority",
    stop_at: Annotated[
        str, typer.Option("--stop-at", help="Take each text to its end (eos) or cut it behind </think> (think).")
    ] = "eos",
    answer_mode: Annotated[
        str | None, typer.Option("--answer-mode", help="auto or integer; default: the run's own, else auto.")
    ] = None,
    modulus: Annotated[int | None, typer.Option("--modulus", help="Reduce integer answers by it (AIMO: 1000).")] = None,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Random subsets of each problem's samples; 1: the saved order only.")
    ] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the subsets and the bootstrap.")] = 0,
    png: Annotated[Path | None, typer.Option("--png", help="Draw accuracy against tokens.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="JSONL: what each rule would have answered, problem by problem."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay saved samples under other rules.

    Stop rules, sample counts and votes, without a GPU or a model.

    A run made with `trtkit solve --full-vote --save-text` is the best thing to replay.
    """
    from trtkit.solve.grading import Grader
    from trtkit.solve.probe_replay import check_probes
    from trtkit.solve.replay import parse_policy
    from trtkit.solve.traces import looks_like_journal
    from trtkit.solve.tradeoff import ReplayOptions, sample_counts, saved_order, trade_offs
    from trtkit.solve.tradeoff_plot import draw_trade_offs, need_matplotlib
    from trtkit.solve.vote import parse_weighting

    _refuse_twice(paths, out=answers)
    runs = [path.is_dir() or looks_like_journal(path) for path in paths]
    refuse_idle(context, [
        (all(runs), ("--fields",), "only with files of traces: a run says what is what"),
        (not any(runs), ("--problems",), "only with a run: a file of traces has its gold answers, --fields gold=..."),
    ])  # fmt: skip
    policies = list({policy.text: policy for policy in map(parse_policy, rules or _RULES)}.values())
    counts = _counts(samples)
    if png is not None:
        need_matplotlib()
    weighting = parse_weighting(weights)
    traces = _read(paths, fields or [], stop_at, problems)
    check_probes(traces, [policy.probe for policy in policies if policy.probe is not None])
    options = ReplayOptions(
        samples=counts or sample_counts(traces),
        order=finish_order,  # type: ignore[arg-type]  # checked there
        batch=batch,
        mode=_mode(answer_mode, modulus, traces),
        weighting=weighting,
        draws=draws,
        seed=seed,
    )
    total = len(traces.problems) * len(options.samples)
    with Grader() as grader:
        with Progress("replay", total=total, unit="votes") as progress:
            rows = trade_offs(traces, policies, options, grader, advance=progress.advance)
        saved = saved_order(traces, policies, options, grader) if answers is not None else []
    _print(traces, rows, seconds=finish_order == "recorded")
    if png is not None:
        draw_trade_offs(rows, png)
        notice(f"picture: {png}")
    if answers is not None:
        _write_answers(answers, saved)
        notice(f"answers: {answers}")
    finish(_advice(paths, fields or [], options, rows), _document(traces, rows) if as_json else None)


def _counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--samples {text!r}: not numbers of samples", hint="e.g. --samples 8,16,32")
    return tuple(dict.fromkeys(map(int, parts)))


def _refuse_twice(paths: Sequence[Path], *, out: Path | None) -> None:
    """Refuse samples that would count twice: doubled votes look like agreement. A run is also its own journal. Nor may
    the answers take the place of the samples."""
    from trtkit.solve.run_head import JOURNAL_FILE

    named = [(path / JOURNAL_FILE if path.is_dir() else path).resolve() for path in paths]
    twice = [str(path) for path, place in zip(paths, named, strict=True) if named.count(place) > 1]
    if twice:
        raise UsageError("the same samples are named twice", offenders=twice, hint="name each run once")
    if out is not None and out.resolve() in named:
        raise UsageError(f"--answers {out}: would replace the samples", hint="name another file")


def _read(paths: list[Path], fields: list[str], stop_at: str, problems: Path | None) -> Traces:
    from trtkit.solve.trace_files import parse_fields, read_trace_file
    from trtkit.solve.traces import CHARACTERS_PER_TOKEN, looks_like_journal, merge, read_run

    if stop_at not in ("think", "eos"):
        raise UsageError(f"--stop-at {stop_at!r}: must be think or eos")
    named = parse_fields(fields)
    parts = []
    for path in paths:
        if path.is_dir() or looks_like_journal(path):
            parts.append(read_run(path, stop_at=stop_at, problems=problems))  # type: ignore[arg-type]  # checked
        else:
            parts.append(read_trace_file(path, named, stop_at=stop_at))  # type: ignore[arg-type]
    traces = merge(parts)
    if traces.estimated:
        logger.warning("no token counts (--fields tokens=...): taking %g characters for a token", CHARACTERS_PER_TOKEN)
    if not any(problem.gold for problem in traces.problems):
        logger.warning("no gold answers, so no accuracy: name them with --problems or --fields gold=...")
    return traces


def _mode(kind: str | None, modulus: int | None, traces: Traces) -> AnswerMode:
    from trtkit.solve.answers import AnswerMode

    if kind is None and modulus is None:
        return traces.mode or AnswerMode()
    return AnswerMode(kind=kind or "auto", modulus=modulus)  # type: ignore[arg-type]  # checked there


def _print(traces: Traces, rows: list[Tradeoff], *, seconds: bool) -> None:
    total = max(traces.count, 1)
    parts = [
        f"{what} {traces.number(what)} ({traces.number(what) / total:.0%})" for what in ("closed", "boxed", "looped")
    ]
    notice(f"{traces.count} traces of {len(traces.problems)} problems: {', '.join(parts)}")
    notice("")
    columns = ["samples", "rule", "accuracy", "(95 %)", "against full", "tokens", "saved",
               "seconds" if seconds else "steps", "saved "]  # fmt: skip
    cells = []
    for row in rows:
        accuracy, change = row.accuracy, row.accuracy_change
        against = (
            "" if change is None else f"{100 * change.value:+.1f} ({100 * change.low:+.1f} .. {100 * change.high:+.1f})"
        )
        cells.append(
            [
                str(row.samples),
                row.rule,
                "-" if accuracy is None else f"{accuracy.value:.1%}",
                "" if accuracy is None else f"{100 * accuracy.low:.1f} .. {100 * accuracy.high:.1f}",
                "" if row.rule == "full" else against,
                f"{row.tokens.value:,.0f}",
                "" if row.rule == "full" else _share(row.tokens_saved),
                f"{row.wall.value:,.1f}" if seconds else f"{row.wall.value:,.0f}",
                "" if row.rule == "full" else _share(row.wall_saved),
            ]
        )
    table(columns, cells, right=[name for name in columns if name != "rule"])
    unit = "seconds" if seconds else "decode steps (the longest running sample's tokens)"
    problems = {row.samples: row.problems for row in rows}
    notice("")
    notice(f"tokens and {unit}: totals over the problems, one after the other; intervals: 95 %, bootstrap")
    for count, number in problems.items():
        if number < len(traces.problems):
            notice(f"{count} samples: only {number} of {len(traces.problems)} problems have that many")


def _share(saved: Interval) -> str:
    return f"{saved.value:.0%} ({100 * saved.low:.0f} .. {100 * saved.high:.0f})"


def _advice(paths: Sequence[Path], fields: Sequence[str], options: ReplayOptions, rows: list[Tradeoff]) -> str:
    """The run with the rule that saves most at no loss, as a line that can be pasted: into a directory of its own."""
    most = max(row.samples for row in rows)
    judged = [row for row in rows if row.samples == most and row.rule != "full"]
    if not judged:
        named = [word for field in fields for word in ("--fields", field)]
        return shlex.join(["trtkit", "revote", *map(str, paths), *named])
    if all(row.accuracy_change is None for row in judged):
        return "name the gold answers, with --problems FILE or --fields gold=..., to see what each rule costs"
    fit = [row for row in judged if row.accuracy_change and row.accuracy_change.value >= -_WORTH]
    fit = [row for row in fit if row.tokens_saved.value + row.wall_saved.value > 0]  # asking samples costs something
    best = max(fit, key=lambda row: row.tokens_saved.value + row.wall_saved.value, default=None)
    line = ["trtkit", "solve", *_solved(paths), "--samples", str(most)]
    for rule in best.rule.split("+") if best else ["none"]:
        asking = rule.startswith("probe(")
        line += ["--probe", rule[len("probe(") : -1]] if asking else ["--stop", "none" if rule == "full" else rule]
    if options.weighting.text != "majority":
        line += ["--weights", options.weighting.text]
    if options.mode.kind != "auto":
        line += ["--answer-mode", options.mode.kind]
    if options.mode.modulus is not None:
        line += ["--modulus", str(options.mode.modulus)]
    return shlex.join([*line, "--out", str(_free(Path("runs") / f"{paths[0].resolve().stem}-stopped"))])


def _solved(paths: Sequence[Path]) -> list[str]:
    """Problems and engine of the run that was replayed, where they are still there; else the usual name."""
    from trtkit.errors import InputError
    from trtkit.solve.run_head import RUN_FILE, problems_file, read_head

    for path in paths:
        directory = path if path.is_dir() else path.parent
        # What lies beside a file of traces may be anything; that of a run was read, and found whole.
        with contextlib.suppress(InputError):
            run = read_head(directory) if (directory / RUN_FILE).is_file() else {}
            problems, engine = problems_file(directory, run), run.get("engine") or {}
            where, model = engine.get("path") or "", engine.get("model")
            if model:  # whether the server still runs will be seen
                seedless = ["--no-endpoint-seeds"] if engine.get("seeds") == "no" else []
                return [str(problems), "--endpoint", where, "--endpoint-model", model, *seedless]
            if (Path(where) / "engine.json").is_file():
                return [str(problems), "--engine", where]
    return ["problems.jsonl"]


def _free(wanted: Path) -> Path:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that holds nothing yet."""
    names = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([wanted], names) if not path.exists())


def _document(traces: Traces, rows: list[Tradeoff]) -> dict[str, Any]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    return {
        "rules": [
            {
                "rule": row.rule,
                "samples": row.samples,
                "accuracy": rounded(row.accuracy.value if row.accuracy else None),
                "accuracy_low": rounded(row.accuracy.low if row.accuracy else None),
                "accuracy_high": rounded(row.accuracy.high if row.accuracy else None),
                "tokens": round(row.tokens.value, 1),
                "wall": round(row.wall.value, 3),
            }
            for row in rows
        ],
        "problems": len(traces.problems),
        "traces": traces.count,
        "closed": traces.number("closed"),
        "boxed": traces.number("boxed"),
        "looped": traces.number("looped"),
    }


def _write_answers(path: Path, saved: list[Saved]) -> None:
    from trtkit.files import write_text

    lines = []
    for row in saved:
        leader, outcome = row.outcome.tally.leader, row.outcome
        lines.append(
            {
                "problem": row.problem,
                "rule": row.rule,
                "samples": row.samples,
                "answer": leader.answer.key if leader else None,
                "gold": row.gold,
                "correct": row.correct,
                "votes": [[vote.answer.key, vote.count] for vote in outcome.tally.ranked],
                "finished": outcome.tally.finished,
                "stopped_early": outcome.stopped_early,
                "tokens": round(outcome.tokens, 1),
                "wall": round(outcome.wall, 3),
            }
        )
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
