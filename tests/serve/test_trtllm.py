"""TensorRT-LLM engines behind the server, through the double: what they cannot do is the request's error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.chat_files import save_chat_files
from tests.serve.serving import client, close_clients, serving
from tests.trtllm_double.install import forget_double, install_double
from tests.trtllm_double.model import make_recipe, save_head, save_model, sources
from trtkit.build.bundle import build_trtllm
from trtkit.build.native import build_native
from trtkit.chat import load_chat
from trtkit.recipe import read_manifest
from trtkit.runtime.api import SamplingParams
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.solve.options import SolveOptions


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("engines")
    model, head = save_model(place / "model"), save_head(place / "head")
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch, place / "dist")
        build_native(dataclasses.replace(make_recipe(model), backend="torch"), place / "torch", device="cpu")
        build_trtllm(make_recipe(model), place / "plain", sources())
        build_trtllm(make_recipe(model, tree="1x2"), place / "drafting", sources(head))
        save_chat_files(place)
        yield place
    forget_double()


def ask(place: Path, name: str, **asked: Any) -> str:
    """The text that the engine ``name`` goes on with after some ids."""
    directory = place / name
    cold = SamplingParams(temperature=0.7)
    voting = SolveOptions(samples=2, max_tokens=20, sampling=cold)
    opening = OpenOptions(device="cpu" if name == "torch" else "auto")
    with serving(
        lambda: open_engine(directory, opening), load_chat(place), voting=voting, manifest=read_manifest(directory)
    ) as (url, _):
        try:
            fields = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 12, **asked}
            return client(url).completions.create(**fields).choices[0].text
        finally:
            close_clients()


def test_the_text_is_the_torch_backends_at_temperature_0(engines: Path) -> None:
    cold: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    assert ask(engines, "plain", **cold) == ask(engines, "torch", **cold) != ""


def test_what_an_engine_cannot_do_is_a_bad_request(engines: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot sample like that"):
        ask(engines, "drafting", top_p=0.9)
    with pytest.raises(openai.BadRequestError, match="log-probabilities"):
        ask(engines, "plain", logprobs=0)
