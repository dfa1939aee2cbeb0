"""Engines on servers, run to their end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tests.runtime.endpoint.scripted_server import ScriptedServer
from trtkit.runtime.api import Engine, FinishReason, StepOutput
from trtkit.runtime.endpoint.engine import EndpointEngine

Opened = Callable[..., tuple[EndpointEngine, ScriptedServer]]
"""The fixture ``opened``: an engine on a scripted server, and that."""


def drain(engine: Engine) -> list[StepOutput]:
    """All that comes while there is work."""
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def told(outputs: Iterable[StepOutput]) -> tuple[list[int], FinishReason | None]:
    """The tokens of one request, and its end."""
    outputs = list(outputs)
    assert len({it.request_id for it in outputs}) == 1
    return [token for it in outputs for token in it.tokens], outputs[-1].finish
