"""``trtkit doctor``: is this machine fit for the job?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from trtkit.cli.options import Json
from trtkit.cli.output import finish, notice, table


def command(as_json: Json = False) -> None:
    """Check versions, GPU, precisions, disk and the bundled checkpoint. Exit code 1 if solving cannot work here."""
    from trtkit.doctor import examine

    diagnosis = examine(Path.cwd())
    table(
        ("check", "", "found"),
        [
            (check.name, check.status, check.detail + (f" - {check.hint}" if check.hint else ""))
            for check in diagnosis.checks
        ],
    )
    notice("")
    table(
        ("precision", "here", "native units need"),
        [(support.precision, support.detail, support.needs) for support in diagnosis.precisions],
    )
    notice("")
    document = {
        "healthy": diagnosis.healthy,
        "checks": [asdict(check) for check in diagnosis.checks],
        "precisions": [asdict(support) for support in diagnosis.precisions],
    }
    broken = [check.name for check in diagnosis.checks if check.status == "fail"]
    advice = f"repair {', '.join(broken)}, then run `trtkit doctor` again" if broken else "trtkit build --precision fp8"
    finish(advice, document if as_json else None)
    if not diagnosis.healthy:
        raise typer.Exit(1)
