"""The process group of torchrun, without one."""

from __future__ import annotations

import pytest
import torch

from trtkit.errors import TrtkitError
from trtkit.training import processes as module
from trtkit.training.processes import processes

CPU = torch.device("cpu")


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A group of two that is joined without the other; grows by one when it is left."""
    groups: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: groups.append("left"))
    return groups


@pytest.mark.parametrize(
    "said",
    [
        "[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9652",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_a_lost_process_is_told_in_words(said: str, left: list[str]) -> None:
    with pytest.raises(TrtkitError, match="another process of this training ended") as caught, processes(CPU, 2):
        raise RuntimeError(said)
    assert str(caught.value.__cause__) == said, "for --debug"
    assert left == ["left"]


def test_another_failure_stays_as_it_is(left: list[str]) -> None:
    with pytest.raises(RuntimeError, match="shapes"), processes(CPU, 2):
        raise RuntimeError("shapes cannot be multiplied")
    assert left == ["left"]


def test_a_member_of_the_group_knows_its_place(left: list[str]) -> None:
    with processes(CPU, 4) as among:
        assert (among.rank, among.world, among.first) == (1, 2, False)
    assert left == ["left"]
