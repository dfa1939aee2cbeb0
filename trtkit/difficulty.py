"""How many tokens a problem will take, guessed from its text alone: a ModernBERT with one output.

The network gives the logarithm of a sample's tokens in standard units; ``Regressor.predict`` turns that into tokens. A
directory holds the network and tokenizer as transformers saves them, and ``difficulty.json``: the units, what it was
trained on, and its error on held-out problems. A regressor that is not better there than the mean is refused.

Training (training/difficulty.py) fits it, solving (solve/difficulty.py) asks it; neither knows the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import CheckpointError, QualityError
from trtkit.files import read_json, write_json

__all__ = ["DIFFICULTY_FILE", "HeldOut", "Labelled", "Regressor", "Units", "load_network", "load_regressor"]

DIFFICULTY_FILE = "difficulty.json"
_VERSION = 1
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A problem and what its samples took."""

    problem: str
    tokens: float
    """Mean tokens of its samples."""
    samples: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Between the network's output and tokens: ``tokens = factor * exp(centre + spread * output)``."""

    centre: float
    """Mean log-tokens of the training problems."""
    spread: float
    """Their standard deviation."""
    factor: float = 1.0
    """exp of a mean logarithm is below the mean: the ratio between the two on held-out problems."""

    def target(self, tokens: float) -> float:
        """What the network should say."""
        return (math.log(tokens) - self.centre) / self.spread

    def tokens(self, output: float) -> float:
        """The inverse of :meth:`target`, up to ``factor``."""
        # No guess is further out than any sample can be; exp must not overflow.
        return self.factor * math.exp(self.centre + self.spread * max(-8.0, min(8.0, output)))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The error on problems that the network was not trained on, against always guessing the training mean.

    ``error`` and ``error_of_mean`` are mean squared errors of log-tokens.
    """

    problems: int
    error: float
    error_of_mean: float
    gain_error: float
    """Standard error of ``error_of_mean - error`` over the held-out problems."""
    rank_correlation: float
    """Spearman's; 0 where it is not defined."""
    off_by_tokens: float
    """Root of the mean squared error in tokens; ``Units.factor`` was fitted on these same problems."""
    mean_off_by_tokens: float
    """The same for the mean."""

    @property
    def usable(self) -> bool:
        """Better than the mean by more than chance: the gain exceeds its own standard error."""
        return self.error_of_mean - self.error > self.gain_error


class Regressor:
    """A network with its tokenizer and units."""

    def __init__(self, network: Any, tokenizer: Any, units: Units, *, max_tokens: int) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.units = units
        self.max_tokens = max_tokens

    def encode(self, problems: Sequence[str]) -> dict[str, Any]:
        """The network's inputs, (problems, tokens): padded, cut after ``max_tokens``."""
        inputs = self.tokenizer(
            list(problems), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return {name: inputs[name].to(self.network.device) for name in ("input_ids", "attention_mask")}

    def forward(self, inputs: dict[str, Any]) -> Any:
        """Outputs in standard units, float32 (problems,)."""
        return self.network(**inputs).logits[:, 0].float()

    def outputs(self, problems: Sequence[str]) -> list[float]:
        """:meth:`forward` over any number of problems, without gradients."""
        import torch

        self.network.eval()
        # Batches of like length waste no padding.
        order = sorted(range(len(problems)), key=lambda i: len(problems[i]))
        found = [0.0] * len(problems)
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                values = self.forward(self.encode([problems[i] for i in batch])).tolist()
                for index, value in zip(batch, values, strict=True):
                    found[index] = value
        return found

    def predict(self, problems: Sequence[str]) -> list[float]:
        """Expected tokens of one sample of each problem."""
        return [self.units.tokens(value) for value in self.outputs(problems)]

    def save(self, directory: Path, held_out: HeldOut, facts: dict[str, Any]) -> None:
        """Write the network, the tokenizer and ``difficulty.json`` into an existing directory."""
        with _quiet_transformers():
            self.network.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        for path in directory.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
        document = {
            "version": _VERSION,
            "usable": held_out.usable,
            "units": asdict(self.units),
            "max_tokens": self.max_tokens,
            "held_out": asdict(held_out),
            **facts,
        }
        write_json(directory / DIFFICULTY_FILE, document)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars, and no warning that the output layer is new: it is what we are after."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_network(directory: Path) -> tuple[Any, Any]:
    """(network with one output in float32, tokenizer) from a directory, trained for this already or not.

    Raises :class:`CheckpointError` when transformers cannot read it or it has no padding token.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
            network = AutoModelForSequenceClassification.from_pretrained(
                str(directory), num_labels=1, problem_type="regression", local_files_only=True
            )
    except Exception as problem:  # transformers raises anything from OSError to KeyError for a broken file
        raise CheckpointError(
            f"cannot be read as a text classifier: {problem}",
            where=str(directory),
            hint="pass a ModernBERT checkpoint (answerdotai/ModernBERT-base or a directory)",
        ) from problem
    # A decoder's tokenizer may have one all the same, but a network that does not know it takes no batches.
    if tokenizer.pad_token_id is None or network.config.pad_token_id is None:
        raise CheckpointError(
            "there is no padding token",
            where=str(directory),
            hint="pass a ModernBERT checkpoint, not a decoder",
        )
    return network.float(), tokenizer


def load_regressor(directory: Path) -> Regressor:
    """What ``trtkit train-difficulty`` made.

    Raises :class:`CheckpointError` for anything else, :class:`QualityError` when it was no better than the mean.
    """
    path = directory / DIFFICULTY_FILE
    if not path.is_file():
        raise CheckpointError(
            f"not a difficulty regressor (no {DIFFICULTY_FILE})",
            where=str(directory),
            hint="make one with `trtkit train-difficulty`",
        )
    document = read_json(path, CheckpointError)
    try:
        version = document["version"]
        units = Units(**{name: float(value) for name, value in document["units"].items()})
        held_out = HeldOut(**document["held_out"])
        max_tokens = int(document["max_tokens"])
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise CheckpointError(f"incomplete or damaged: {problem}", where=str(path)) from None
    if version != _VERSION:
        raise CheckpointError(f"format {version}, this trtkit reads {_VERSION}", where=str(path), hint="train it again")
    if not held_out.usable:
        raise QualityError(
            f"this regressor is no better than guessing the mean: squared error {held_out.error:.3f} on "
            f"{held_out.problems} held-out problems, the mean's {held_out.error_of_mean:.3f} "
            f"(gain needed: more than {held_out.gain_error:.3f})",
            where=str(directory),
            hint="train it on more problems, or solve without --difficulty",
        )
    network, tokenizer = load_network(directory)
    return Regressor(network, tokenizer, units, max_tokens=max_tokens)
