"""A run's places; and sandboxes that the tests of a module share: starting one takes a while."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.solve.sandboxes import LONG, SHORT, WALLS, open_sandbox
from tests.solve.scripted import places_in
from trtkit.solve.run import Places
from trtkit.solve.sandbox import Sandbox
from trtkit.solve.sandbox_jail import LAYERS


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return places_in(tmp_path, 6)


@pytest.fixture(scope="module", params=list(WALLS))
def walled(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(WALLS[request.param]) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def strong() -> Iterator[Sandbox]:
    with open_sandbox(LAYERS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def naked() -> Iterator[Sandbox]:
    with Sandbox(LONG, layers=()) as sandbox:
        yield sandbox


@pytest.fixture(scope="module", params=["no namespaces", "namespaces only"])
def hasty(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(WALLS[request.param], SHORT) as sandbox:
        yield sandbox
