"""What can be measured: each peer, its variants, the module of its worker and the environment it runs in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peers import llama, openvino, ours, vllm

__all__ = ["OURS", "PEERS", "Line", "Peer", "chosen", "with_forced"]

OURS = "trtkit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One engine."""

    module: str
    variants: tuple[str, ...]
    what: str
    environment: str | None
    """A name of ``environments.ENVIRONMENTS``; None: this interpreter."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Set in its processes."""


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """One line of the table."""

    peer: str
    variant: str

    def __str__(self) -> str:
        return f"{self.peer}:{self.variant}"


PEERS: dict[str, Peer] = {
    "transformers": Peer(
        module="peers.hf", variants=("bf16", "fp32"), environment="transformers",
        what="transformers generate, sdpa, dynamic cache",
    ),
    "llama": Peer(
        module="peers.llama", variants=llama.VARIANTS, environment="llama", what="llama.cpp through llama-cpp-python",
    ),
    "openvino": Peer(
        module="peers.openvino", variants=tuple(openvino.VARIANTS), environment="openvino",
        what="OpenVINO GenAI, continuous batching",
    ),
    "vllm": Peer(
        module="peers.vllm", variants=vllm.VARIANTS, environment="vllm", what="vLLM's CPU engine (community build)",
    ),
    OURS: Peer(module="peers.ours", variants=ours.VARIANTS, environment=None, what="this project's torch runtime"),
}  # fmt: skip


def chosen(
    names: Sequence[str], peers: Mapping[str, Peer] = PEERS, *, drafting: bool = False, forced: Sequence[str] = ()
) -> list[Line]:
    """The lines that ``names`` (``peer`` or ``peer:variant``; none: all) mean, ours with its draft head too if
    ``drafting``, and with an ending of ``forced`` only where it is named. Raises ValueError naming every unknown one.
    """
    lines: list[Line] = []
    wrong: list[str] = []
    for name in names or list(peers):
        peer, _, variant = name.partition(":")
        known = list(peers[peer].variants) if peer in peers else []
        if peer == OURS and drafting:
            known += [found + ours.DRAFTING for found in known]
        picked = [variant] if variant else known
        more = [found + end for found in known for end in forced] if peer == OURS else []
        if peer not in peers or any(found not in (*known, *more) for found in picked):
            wrong.append(name)
            continue
        lines += [Line(peer, found) for found in picked]
    if wrong:
        raise ValueError(f"unknown: {', '.join(wrong)} (see --list)")
    return list(dict.fromkeys(lines))


def with_forced(lines: Sequence[Line], forced: Sequence[str]) -> list[Line]:
    """After each of our lines the same with every ending of ``forced``."""
    found: list[Line] = []
    for line in lines:
        plain = line.peer == OURS and "+" not in line.variant
        found += [line, *(Line(OURS, line.variant + end) for end in (forced if plain else ()))]
    return list(dict.fromkeys(found))
