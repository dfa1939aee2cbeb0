from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.network
def test_the_wheel_brings_everything(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    practice = {path.name for path in (ROOT / "engines" / "practice").iterdir() if path.is_file()}
    assert {f"trtkit/_engines/practice/{name}" for name in practice} <= names
    assert {"trtkit/cli/app.py", "drafter/model.py", "trtkit/report/templates/page.html.j2"} <= names
    kernels = {path.name for path in (ROOT / "trtkit/runtime/native").iterdir() if path.suffix in (".cpp", ".h")}
    assert len(kernels) > 1
    assert {f"trtkit/runtime/native/{name}" for name in kernels} <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "trtkit = trtkit.cli.__main__:main" in zipfile.ZipFile(wheel).read(entry).decode()
    (licence,) = (name for name in names if name.endswith("LICENSE"))
    assert b"Apache License" in zipfile.ZipFile(wheel).read(licence)
