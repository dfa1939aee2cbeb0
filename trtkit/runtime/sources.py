"""Where samples come from: an engine directory of this machine, or a server. What ``solve`` and ``serve`` open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trtkit.chat import Chat, load_chat
from trtkit.recipe import EngineManifest, read_manifest
from trtkit.runtime.api import Engine, SamplingParams
from trtkit.runtime.trtllm_sampling import notices_for

if TYPE_CHECKING:
    from trtkit.runtime.load import OpenOptions

__all__ = ["DirectorySource", "Source"]


class Source(Protocol):
    """What can be opened as an engine, and is known before it is.

    Directories are :class:`DirectorySource`, servers :class:`trtkit.runtime.endpoint.remote.Remote`.
    """

    @property
    def place(self) -> Path | Mapping[str, str]:
        """For the record of a run: the directory, or what tells one server's model from another's."""

    @property
    def model(self) -> str:
        """The checkpoint."""

    @property
    def told(self) -> str:
        """Where it is and what, in a few words."""

    @property
    def card(self) -> Mapping[str, str]:
        """What the list of a server's models says of it."""

    @property
    def greedy(self) -> bool:
        """Samples of one prompt are all but the same, so that only different prompts make votes."""

    @property
    def chat(self) -> Chat:
        """Its tokenizer."""

    def notices(self, sampling: SamplingParams, *, logprobs: bool = False) -> tuple[str, ...]:
        """What to say before a run. Raises :class:`UsageError` where it cannot sample so."""

    def open(self, options: OpenOptions | None = None, *, patient: bool = False) -> Engine:
        """An engine on it. ``patient``: the caller has a clock, so that a server that is gone is waited for."""


@dataclass(frozen=True)
class DirectorySource:
    """An engine directory."""

    place: Path
    manifest: EngineManifest

    @classmethod
    def of(cls, directory: Path) -> DirectorySource:
        """Raises :class:`EngineError` for a directory that holds no engine."""
        return cls(directory, read_manifest(directory))

    @property
    def model(self) -> str:
        """The checkpoint that it was built from."""
        return self.manifest.recipe.model

    @property
    def told(self) -> str:
        """Directory and precision."""
        return f"{self.place} ({self.manifest.recipe.precision})"

    @property
    def card(self) -> Mapping[str, str]:
        """Checkpoint and precision."""
        return {"root": self.model, "precision": self.manifest.recipe.precision}

    @property
    def greedy(self) -> bool:
        """A compiled engine for temperature 0."""
        return self.manifest.recipe.greedy

    @cached_property
    def chat(self) -> Chat:
        """The directory's tokenizer. Raises :class:`CheckpointError` where there is none."""
        return load_chat(self.place)

    def notices(self, sampling: SamplingParams, *, logprobs: bool = False) -> tuple[str, ...]:
        """As :class:`Source`."""
        return notices_for(self.manifest, sampling, logprobs=logprobs)

    def open(self, options: OpenOptions | None = None, *, patient: bool = False) -> Engine:
        """As :func:`trtkit.runtime.load.open_engine`."""
        from trtkit.runtime.load import open_engine  # loads torch

        return open_engine(self.place, options)
