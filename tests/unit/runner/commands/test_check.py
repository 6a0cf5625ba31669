"""`runner.commands.check`: it finds tokens that em_disco would refuse."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from runner.commands.check import print_rows, token_problems
from runner.supervision.fork_server import ForkServer
from runner.supervision.probes import Probes
from shared.config.handlers import HandlerRef
from shared.config.load import Agent
from shared.config.nodes import parse_node
from shared.config.tokens import Secret, TokenSource, mint
from shared.errors import StartError

SECRET = "a-secret-of-more-than-thirty-two-bytes"


def problems(source: TokenSource) -> list[str]:
    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    return token_problems(
        Agent(name="echo", handler=handler, nodes=(parse_node("h"),), token=source)
    )


def test_valid_token_or_no_token_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    assert problems(TokenSource()) == []
    assert problems(TokenSource(secret_file=tmp_path / "secret")) == []
    assert problems(TokenSource(token=Secret(mint(SECRET, "echo", ttl_s=3600)))) == []


# Functions, because a token that is minted at the collection could expire before the test.
REFUSED: list[tuple[Callable[[], str], str]] = [
    (
        lambda: mint(SECRET, "other", ttl_s=60),
        "the token's sub is 'other', not the agent's name 'echo'",
    ),
    (lambda: mint(SECRET, "echo", ttl_s=-7200), "the token expired 2 hours ago"),
    (lambda: "s3cr3t", "not a valid token"),
]
IDS = ["of another agent", "expired", "not a token"]


@pytest.mark.parametrize("issue", [issue for issue, _ in REFUSED], ids=IDS)
def test_refused_token_is_a_problem_that_does_not_show_it(issue: Callable[[], str]) -> None:
    token = issue()
    (problem,) = problems(TokenSource(token=Secret(token)))
    assert "'echo'" in problem
    assert token not in problem


@pytest.mark.message_text
@pytest.mark.parametrize(("issue", "message"), REFUSED, ids=IDS)
def test_message_for_a_refused_token_names_agent_source_and_fault(
    issue: Callable[[], str], message: str
) -> None:
    (problem,) = problems(TokenSource(token=Secret(issue())))
    assert problem.startswith(f"agent 'echo', token (configured): {message}")


UNUSABLE_SECRETS = [
    (None, "cannot read"),
    ("short", "the secret has 5 bytes, at least 32 are needed"),
    ("ssh-rsa AAAAB3NzaC1yc2E", "no token can be signed with this secret"),
]


def secret_source(folder: Path, secret: str | None) -> TokenSource:
    """Return the source of tokens that are minted with a secret; None for a missing file."""
    if secret is not None:
        (folder / "secret").write_text(secret)
    return TokenSource(secret_file=folder / "secret")


@pytest.mark.parametrize("secret", [secret for secret, _ in UNUSABLE_SECRETS])
def test_unusable_secret_is_one_problem(secret: str | None, tmp_path: Path) -> None:
    assert len(problems(secret_source(tmp_path, secret))) == 1


def test_missing_token_file_is_a_problem_that_names_it(tmp_path: Path) -> None:
    (problem,) = problems(TokenSource(token_file=tmp_path / "missing"))
    assert f"{tmp_path}/missing" in problem


@pytest.mark.message_text
@pytest.mark.parametrize(("secret", "message"), UNUSABLE_SECRETS)
def test_message_for_an_unusable_secret_has_the_reason(
    secret: str | None, message: str, tmp_path: Path
) -> None:
    (problem,) = problems(secret_source(tmp_path, secret))
    assert message in problem


@pytest.mark.message_text
def test_message_for_a_missing_token_file_names_agent_and_source(tmp_path: Path) -> None:
    (problem,) = problems(TokenSource(token_file=tmp_path / "missing"))
    assert problem.startswith(f"agent 'echo', token (file {tmp_path}/missing): cannot read")


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_of_any_width_gets_one_line_for_a_worker(width: int) -> None:
    row = (
        "echo_server",
        "echo",
        "ws://localhost:8080",
        "examples.echo:handle",
        "ram",
        "search, query, echo",
        "none",
    )
    console = Console(width=width, record=True, force_terminal=True, file=StringIO())
    print_rows([row], console)
    text = console.export_text()
    assert len(text.splitlines()) == 2
    assert all(cell in text for cell in row)


@pytest.fixture(params=[BrokenPipeError(32, "Broken pipe"), EOFError()])
def broken_fork_server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> ForkServer:
    """Return a fork server that starts no process."""

    def refuse(*arguments: object) -> None:
        raise request.param

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", refuse)
    return ForkServer()


def test_fork_server_that_starts_no_process_is_an_error(broken_fork_server: ForkServer) -> None:
    with pytest.raises(StartError):
        Probes(broken_fork_server).probe(HandlerRef("worker.echo", None, "handle", Path("/")))


@pytest.mark.message_text
def test_message_for_a_fork_server_that_starts_no_process_has_a_hint(
    broken_fork_server: ForkServer,
) -> None:
    message = r"no process could be started: .*; may this user execute"
    with pytest.raises(StartError, match=message):
        Probes(broken_fork_server).probe(HandlerRef("worker.echo", None, "handle", Path("/")))


@pytest.mark.parametrize("may_enter", [True, False])
def test_fork_server_changes_the_folder_only_if_it_may_not_enter_it(
    may_enter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", lambda: None)
    monkeypatch.setattr("runner.supervision.fork_server.os.access", lambda path, mode: may_enter)
    ForkServer().start()
    assert Path.cwd() == (tmp_path if may_enter else Path("/"))
