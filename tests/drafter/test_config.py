"""The shapes of heads and trees."""

from __future__ import annotations

import pytest

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter


def test_a_head_is_the_published_one_unless_told_otherwise() -> None:
    config = DrafterConfig(hidden_size=4, vocab_size=6, exit_dim=8)
    assert (config.num_draft_layers, config.rnn, config.projects_input) == (2, True, False)
    assert not [name for name in Drafter(config).state_dict() if "input" in name], "[context ; state] goes in as it is"


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize(("exit_dim", "layers"), [(8, 2), (5, 1), (5, 0), (1, 3)])
def test_the_weights_are_counted(exit_dim: int, layers: int, rnn: bool) -> None:
    config = DrafterConfig(hidden_size=4, vocab_size=6, exit_dim=exit_dim, num_draft_layers=layers, rnn=rnn)
    assert config.projects_input == (exit_dim != 8)
    assert config.parameters == sum(weight.numel() for weight in Drafter(config).parameters())


def test_shapes_that_cannot_be_are_all_told() -> None:
    with pytest.raises(ValueError, match="must") as refused:
        DrafterConfig(hidden_size=0, vocab_size=-1, exit_dim=0, num_draft_layers=-1)
    said = "hidden_size must be positive; vocab_size must be positive; exit_dim must be positive; "
    assert str(refused.value) == said + "num_draft_layers must not be negative"
    assert DrafterConfig(hidden_size=1, vocab_size=1, exit_dim=1, num_draft_layers=0).parameters > 0


@pytest.mark.parametrize(("beams", "length"), [(0, 3), (3, 0), (-1, 1)])
def test_a_tree_has_a_beam_and_a_token(beams: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"not {beams}x{length}"):
        TreeShape(beams=beams, length=length)


def test_a_tree_is_written_as_people_do_and_holds_the_root() -> None:
    assert str(TreeShape(beams=4, length=3)) == "4x3"
    assert TreeShape(beams=4, length=3).max_nodes == 13
    assert TreeShape(beams=1, length=1).max_nodes == 2
