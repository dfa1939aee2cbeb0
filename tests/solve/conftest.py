"""Sandboxes that the tests of a module share: starting one takes a while."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.solve.sandboxes import LONG, SHORT, WALLS, open_sandbox
from trtkit.solve.sandbox import Sandbox
from trtkit.solve.sandbox_jail import LAYERS


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
