"""The bodies of replies, without a server."""

from __future__ import annotations

import pytest

from trtkit.errors import CapacityError, EngineError, InputError, RequestError, TrtkitError
from trtkit.serve.replies import error_reply


@pytest.mark.parametrize(
    ("problem", "status", "answered", "kind"),
    [
        (InputError("x"), None, 400, "invalid_request_error"),
        (RequestError("x"), None, 400, "invalid_request_error"),
        (InputError("x"), 401, 401, "authentication_error"),
        (InputError("x"), 404, 404, "not_found_error"),
        (InputError("x"), 405, 405, "invalid_request_error"),
        (CapacityError("x"), 429, 429, "rate_limit_error"),
        (CapacityError("x"), None, 500, "server_error"),
        (EngineError("x"), None, 500, "server_error"),
        (EngineError("x"), 503, 503, "server_error"),
    ],
)
def test_an_error_has_the_kind_that_clients_know(
    problem: TrtkitError, status: int | None, answered: int, kind: str
) -> None:
    error = {"message": "x", "type": kind, "param": None, "code": None}
    assert error_reply(problem, status=status) == (answered, {"error": error})


def test_an_error_says_all_that_is_wrong_and_what_to_do() -> None:
    many = InputError("two things", offenders=("a: wrong", "b: wrong"), hint="leave them out")
    assert error_reply(many)[1]["error"]["message"] == "two things: a: wrong; b: wrong (leave them out)"
