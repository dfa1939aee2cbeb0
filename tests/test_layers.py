"""The house's layers, enforced: imports point to lower lines only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "interrupts", "files", "log", "locks", "staging", "tables", "bundled", "closing"),
    ("model_spec", "scheme", "gpu"),
    ("recipe", "decoder", "known_models"),
    ("quant", "plan"),
    ("checkpoint", "chat", "difficulty"),
    ("runtime", "build"),
    ("solve", "training"),
    ("bench", "report", "serve", "doctor", "describe", "gpu_check"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FOUNDATION = LAYERS[0]
"""Their neighbours may import each other in the order in which they are listed: errors, files, log, locks, staging."""
ONLY_IN = {
    "tensorrt_llm": {"trtkit/runtime/trtllm_engine.py", "trtkit/build/trtllm.py"},
    "modelopt": {"trtkit/quant/modelopt.py"},
    "aiohttp": {"trtkit/runtime/endpoint/client.py"},
}
FILES = sorted(path for package in ("trtkit", "drafter") for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            yield node.lineno, module
            if module == "trtkit":
                yield from ((node.lineno, f"trtkit.{alias.name}") for alias in node.names if alias.name in LEVEL)


def complaint(path: Path, module: str) -> str:
    """Why ``path`` must not import ``module``; empty when it may."""
    parts, here = module.split("."), path.relative_to(ROOT).with_suffix("").parts
    allowed = ONLY_IN.get(parts[0])
    if allowed is not None:
        return "" if path.relative_to(ROOT).as_posix() in allowed else f"only {', '.join(sorted(allowed))} may"
    if parts[0] != "trtkit" or len(parts) == 1:
        return ""
    if here[0] == "drafter":
        return "the drafter knows nothing of trtkit"
    mine, theirs = here[1], parts[1]
    if mine == theirs or mine == "__init__":
        return ""
    if mine in FOUNDATION and theirs in FOUNDATION:
        return "" if FOUNDATION.index(theirs) < FOUNDATION.index(mine) else "wrong order in the foundation"
    return "" if LEVEL[theirs] < LEVEL[mine] else f"{mine} (layer {LEVEL[mine]}) is not above {theirs}"


def test_every_module_has_a_layer() -> None:
    names = {path.relative_to(ROOT / "trtkit").parts[0].removesuffix(".py") for path in FILES if "trtkit" in path.parts}
    assert names - {"__init__"} <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    found = [(line, module, complaint(path, module)) for line, module in imports(path)]
    assert [f"{path.name}:{line}: {module}: {why}" for line, module, why in found if why] == []
