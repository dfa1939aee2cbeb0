"""``scripts/bench_peers``: what else decodes this checkpoint on this machine's CPU, and how fast, beside trtkit.

Each engine comes from the package index into an environment of its own, and all decode the same checkpoint (random
weights unless --model names another): the same prompt for B samples at temperature 1, the whole vocabulary, no stop
token. One fresh process per engine and round; sampling is part of a step. Nothing about accuracy is measured here.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
import sys
from pathlib import Path
from typing import Any

from peers import ours
from peers.catalogue import OURS, PEERS, Line, chosen, with_forced
from peers.checkpoint import make_checkpoint
from peers.environments import ENVIRONMENTS
from peers.machine import cores, cpu_features, cpu_name
from peers.report import document, notes, rows_of, table_rows
from peers.run import Plan, Run, run_peers
from trtkit.cli.output import facts, finish, notice, table
from trtkit.errors import TrtkitError
from trtkit.files import read_json, write_json

EXAMPLES = """examples:
  scripts/bench_peers                                        everything, batches 1, 8, 16 and 32, three rounds
  scripts/bench_peers --peers transformers,llama --batches 1,8,32
  scripts/bench_peers --peers llama:Q4_0,trtkit:int4 --batches 1
  scripts/bench_peers --model engines/practice --problem 'What is 17*23?' --peers trtkit     drafting too
  scripts/bench_peers --peers llama:Q8_0,trtkit:int8 --forced    and int8 with a random draft head, acceptance forced
"""


def main() -> int:
    """Parse, measure, print."""
    arguments = _parse()
    if arguments.list:
        _show_list()
        return 0
    try:
        return _measure(arguments)
    except TrtkitError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_peers", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the peers, their variants and versions; measures nothing")
    parser.add_argument("--peers", default="", metavar="P,P:V", help="comma-separated peers or peer:variant; all")
    parser.add_argument("--batches", type=_batches, default=(1, 8, 16, 32), metavar="B,B", help="1,8,16,32")
    parser.add_argument("--rounds", type=_count, default=3, metavar="N", help="fresh processes per line (3)")
    parser.add_argument("--new-tokens", type=_count, default=40, metavar="N", help="per sample (40)")
    parser.add_argument("--prompt-tokens", type=_count, default=128, metavar="N", help="random ones (128)")
    parser.add_argument("--threads", type=_count, default=cores(), metavar="N", help="of every engine (all cores)")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"), metavar="DIR",
                        help="environments, checkpoints, logs, peers.json (runs/peers)")  # fmt: skip
    parser.add_argument(
        "--shape", default="0.5b", choices=("0.5b", "1.5b", "tiny"), help="of the random weights (0.5b)"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a bf16 Hugging Face checkpoint in its place; with "
                        "a draft head in DIR/drafter trtkit is measured drafting too")  # fmt: skip
    parser.add_argument("--forced", action="store_true", help="without DIR/drafter: trtkit's lines also with a draft "
                        "head of random weights and the acceptance forced to the published profile (LINE+forced), and "
                        "drafting the first 32768 tokens only where there are more (LINE+forced-32k); these lines can "
                        "be named in --peers too, and are not measured otherwise")  # fmt: skip
    parser.add_argument("--problem", metavar="TEXT", help="with --model: its prompt, in place of random tokens")
    parser.add_argument("--timeout", type=_count, default=1800, metavar="S", help="seconds for one process (1800)")
    parser.add_argument("--patience", type=float, default=60, metavar="S",
                        help="seconds to wait for a busy machine before each process (60)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the JSON document as the last line")
    arguments = parser.parse_args()
    if arguments.problem and not arguments.model:
        parser.error("--problem needs --model: the tokenizer of random weights has no words")
    return arguments


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _batches(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part) for part in text.split(",")}))


def _show_list() -> None:
    rows = []
    for name, peer in PEERS.items():
        environment = ENVIRONMENTS[peer.environment] if peer.environment else None
        packages = [p for p in ((environment.head, *environment.packages) if environment else ()) if p]
        note = f"; {environment.note}" if environment and environment.note else ""
        if name == OURS:
            note = (
                f"; each {ours.DRAFTING} (with DIR/drafter) or {ours.FORCED}, {ours.FORCED_TRIMMED} (by name, --forced)"
            )
        rows.append([name, " ".join(peer.variants), peer.what + note, " ".join(packages) or "this checkout"])
    table(["peer", "variants", "", "installs"], rows)
    finish("scripts/bench_peers --peers transformers,trtkit --batches 1,8", None)


def _measure(arguments: argparse.Namespace) -> int:
    model = arguments.model or make_checkpoint(arguments.shape, arguments.work / f"checkpoint-{arguments.shape}")
    work: Path = arguments.work / "models" / (arguments.model.resolve().name if arguments.model else arguments.shape)
    try:
        lines = _lines(arguments, model)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    plan = Plan(
        lines=tuple(lines), peers=PEERS, work=arguments.work, prepared=work, model=model,
        prompt=_prompt(model, arguments), batches=arguments.batches, new_tokens=arguments.new_tokens,
        rounds=arguments.rounds, threads=arguments.threads, timeout_seconds=arguments.timeout,
        patience_seconds=arguments.patience,
    )  # fmt: skip
    run, path = Run(), arguments.work / "peers.json"

    def found() -> dict[str, Any]:
        return document(run, rows_of(run, lines), _facts(plan))

    interrupted = False
    try:
        run_peers(plan, run, lambda text: print(text, file=sys.stderr, flush=True), lambda: write_json(path, found()))
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: this is what there is", file=sys.stderr)
    write_json(path, found())
    _show(plan, run)
    notice(f"files: {path}")
    slowest = next((line for line in lines if line.peer != OURS), lines[0])
    finish(f"scripts/bench_peers --peers {slowest}", found() if arguments.json else None)
    return 130 if interrupted else 0 if rows_of(run, lines) else 1


def _lines(arguments: argparse.Namespace, model: Path) -> list[Line]:
    names = [name for name in arguments.peers.split(",") if name]
    if (model / "drafter").is_dir():
        if arguments.forced:
            raise ValueError(f"--forced is for checkpoints without a draft head, and there is {model / 'drafter'}")
        return chosen(names, drafting=True)
    forced = ours.forced_endings(read_json(model / "config.json")["vocab_size"])
    lines = chosen(names, forced=forced)
    if not arguments.forced:
        return lines
    if not any(line.peer == OURS for line in lines):
        raise ValueError(f"--forced adds to the lines of {OURS}, and --peers names none")
    return with_forced(lines, forced)


def _prompt(model: Path, arguments: argparse.Namespace) -> tuple[int, ...]:
    if arguments.problem:
        from trtkit.chat import VARIANTS, load_chat

        return tuple(load_chat(model).prompt(arguments.problem, VARIANTS["solve"]))
    source, vocab = random.Random(0), read_json(model / "config.json")["vocab_size"]
    return tuple(source.randrange(vocab) for _ in range(arguments.prompt_tokens))


def _facts(plan: Plan) -> dict[str, Any]:
    return {
        "version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "features": cpu_features(), "cores": cores(), "system": platform.platform()},
        "task": {
            "model": str(plan.model), "prompt_tokens": len(plan.prompt), "new_tokens": plan.new_tokens,
            "batches": list(plan.batches), "rounds": plan.rounds, "threads": plan.threads,
        },
    }  # fmt: skip


def _show(plan: Plan, run: Run) -> None:
    rows = rows_of(run, plan.lines)
    known = _facts(plan)
    read = run.read_bytes_per_second
    facts(
        "machine",
        {
            "cpu": f"{known['machine']['cpu']} ({' '.join(known['machine']['features']) or 'no AVX2'})",
            "threads": f"{plan.threads} of {cores()} usable cores",
            "memory": f"reads {max(read) / 1e9:.1f} GB/s (best of {len(read)}, lowest {min(read) / 1e9:.1f})"
            if read
            else "not measured",
            "task": f"{plan.model}, {len(plan.prompt)} prompt and {plan.new_tokens} new tokens, medians of "
            f"{plan.rounds} processes",
        },
    )
    notice("")
    headings, lines = table_rows(rows, plan.batches)
    table(headings, lines, right=headings[2:])
    notice("")
    notice("ms of one decode step, sampling included; of read: weight bytes / step time / read bandwidth at B=1;")
    notice(f"prefill of the prompt at B={min(plan.batches)}; load with imports; RSS with mapped weights, all batches.")
    for line in notes(run, rows):
        notice(line)


if __name__ == "__main__":
    raise SystemExit(main())
