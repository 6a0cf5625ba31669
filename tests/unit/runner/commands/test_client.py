"""`runner.commands.client`: the code of an error response decides what it means."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from runner.cli import cli
from runner.commands import client
from runner.state_dir import ReloadOutcome, ReloadResult
from shared.errors import CommandError
from shared.http.errors import ErrorBody, ErrorCode


@pytest.mark.parametrize("code", ErrorCode)
def test_error_response_with_a_code_is_the_runners_with_any_text(code: ErrorCode) -> None:
    answer = client.Response(code.status, {"error": "reworded", "code": str(code)}, None)
    error = client.convert("http://127.0.0.1:1", answer, ErrorBody)
    assert (error.code, error.error) == (code, "reworded")


@pytest.mark.parametrize(
    "body",
    [
        {"error": "there is no agent 'a'"},
        {"error": "there is no agent 'a'", "code": "no_such_code"},
        {"error": "there is no agent 'a'", "code": 404},
        {"error": None, "code": "unknown_agent"},
        ["unknown_agent"],
        None,
    ],
)
def test_error_response_without_a_known_code_is_from_another_server(body: Any) -> None:
    with pytest.raises(CommandError):
        client.convert("http://127.0.0.1:1", client.Response(404, body, None), ErrorBody)


@pytest.mark.parametrize(
    ("result", "status"), [("done", 0), ("incomplete", 1), ("refused", 1), ("invalid", 78)]
)
def test_reload_exits_with_78_only_if_the_configuration_is_invalid(
    result: ReloadResult, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "reload", lambda _: ReloadOutcome(result, ""))
    assert CliRunner().invoke(cli, ["reload"]).exit_code == status
