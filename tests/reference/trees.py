"""Draft trees and acceptance with dictionaries and loops."""

from __future__ import annotations


def tree_nodes(root: int, beams: list[list[int]]) -> list[tuple[int, ...]]:
    """The distinct prefixes of all beams in order of first appearance, the root's empty prefix first."""
    nodes: list[tuple[int, ...]] = [()]
    for beam in beams:
        for end in range(1, len(beam) + 1):
            if tuple(beam[:end]) not in nodes:
                nodes.append(tuple(beam[:end]))
    return nodes


def accepted(nodes: list[tuple[int, ...]], picks: list[int]) -> tuple[list[int], list[int]]:
    """(path of node indices, emitted tokens) when the target draws ``picks[i]`` at node i."""
    path, emitted, here = [0], [picks[0]], nodes[0]
    while (*here, emitted[-1]) in nodes:
        here = (*here, emitted[-1])
        path.append(nodes.index(here))
        emitted.append(picks[path[-1]])
    return path, emitted
