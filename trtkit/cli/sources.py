"""What ``trtkit solve`` solves with: an engine directory of this machine, or a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trtkit.cli.engines import stem
from trtkit.recipe import EngineManifest, read_manifest
from trtkit.runtime.api import Engine, SamplingParams

if TYPE_CHECKING:
    from trtkit.chat import Chat
    from trtkit.runtime.endpoint.remote import Remote
    from trtkit.runtime.load import OpenOptions

__all__ = ["DirectorySource", "ServerSource", "Source"]


class Source(Protocol):
    """Where samples come from."""

    @property
    def place(self) -> Path | Mapping[str, str]:
        """For the record; see :class:`trtkit.solve.run.Places`."""

    @property
    def name(self) -> str:
        """For the names of files."""

    @property
    def greedy(self) -> bool:
        """Samples of one prompt are all the same."""

    def chat(self) -> Chat:
        """Its tokenizer."""

    def notices(self, sampling: SamplingParams, *, logprobs: bool) -> tuple[str, ...]:
        """What to say before a run. Raises :class:`UsageError` where it cannot sample so."""

    def open(self, options: OpenOptions) -> Engine:
        """An engine on it."""


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """An engine directory."""

    place: Path
    manifest: EngineManifest

    @classmethod
    def of(cls, directory: Path) -> DirectorySource:
        """Raises :class:`EngineError` for a directory that holds no engine."""
        return cls(directory, read_manifest(directory))

    @property
    def name(self) -> str:
        return self.place.resolve().name

    @property
    def greedy(self) -> bool:
        return self.manifest.recipe.greedy

    def chat(self) -> Chat:
        from trtkit.chat import load_chat

        return load_chat(self.place)

    def notices(self, sampling: SamplingParams, *, logprobs: bool) -> tuple[str, ...]:
        from trtkit.runtime.trtllm_sampling import notices_for

        return notices_for(self.manifest, sampling, logprobs=logprobs)

    def open(self, options: OpenOptions) -> Engine:
        from trtkit.runtime.load import open_engine

        return open_engine(self.place, options)


@dataclass(frozen=True, slots=True)
class ServerSource:
    """A server; of the options it takes the rows, everything else is its own business."""

    remote: Remote

    @classmethod
    def at(cls, url: str, *, model: str | None, tokenizer: str | None, seeds: bool) -> ServerSource:
        """Raises what :func:`endpoint_named` and :func:`connect` raise."""
        from trtkit.runtime.endpoint.remote import connect
        from trtkit.runtime.endpoint.server import endpoint_named

        return cls(connect(endpoint_named(url, model=model, seeds=seeds), tokenizer))

    @property
    def place(self) -> Mapping[str, str]:
        return self.remote.identity

    @property
    def name(self) -> str:
        return stem(self.remote.server.model)

    @property
    def greedy(self) -> bool:
        return False

    def chat(self) -> Chat:
        return self.remote.chat

    def notices(self, sampling: SamplingParams, *, logprobs: bool) -> tuple[str, ...]:
        return self.remote.notices(sampling, logprobs=logprobs)

    def open(self, options: OpenOptions) -> Engine:
        return self.remote.open(options.rows)
