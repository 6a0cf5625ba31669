"""`runner.check`: a token that em_disco would refuse is found before the first worker runs."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from runner.check import show, token_problems
from runner.process import ForkServer
from shared.config import Agent
from shared.errors import StartError
from shared.handlers import HandlerRef
from shared.nodes import parse_node
from shared.tokens import Secret, TokenSource, mint

SECRET = "a-secret-of-more-than-thirty-two-bytes"


def problems(source: TokenSource) -> list[str]:
    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    return token_problems(Agent(name="echo", handler=handler, nodes=(parse_node("h"),), token=source))


def test_good_tokens_and_none_are_no_problem(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    assert problems(TokenSource()) == []
    assert problems(TokenSource(secret_file=tmp_path / "secret")) == []
    assert problems(TokenSource(token=Secret(mint(SECRET, "echo", ttl_s=3600)))) == []


@pytest.mark.parametrize(
    ("issue", "says"),
    [
        (lambda: mint(SECRET, "other", ttl_s=60), "the token's sub is 'other', not the agent's name 'echo'"),
        (lambda: mint(SECRET, "echo", ttl_s=-7200), "the token expired 2 hours ago"),
        (lambda: "s3cr3t", "not a valid token"),
    ],
    ids=["of another", "expired", "not a token"],
)
def test_token_that_would_be_refused_is_told_with_the_agent_and_its_place(issue: Callable[[], str], says: str) -> None:
    token = issue()  # Minted now: a whole test run may pass between the collection and here.
    (problem,) = problems(TokenSource(token=Secret(token)))
    assert problem.startswith(f"agent 'echo', token (configured): {says}")
    assert token not in problem


def test_token_file_that_is_missing_is_told(tmp_path: Path) -> None:
    (problem,) = problems(TokenSource(token_file=tmp_path / "gone"))
    assert problem.startswith(f"agent 'echo', token (file {tmp_path}/gone): cannot read")


@pytest.mark.filterwarnings("ignore:The HMAC key is")
def test_short_secret_is_told_with_its_length(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("short")
    (problem,) = problems(TokenSource(secret_file=tmp_path / "secret"))
    assert problem.endswith("the secret has 5 bytes, at least 32 are needed for HS256")


def test_half_of_a_key_pair_is_told(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("ssh-rsa AAAAB3NzaC1yc2E")
    (problem,) = problems(TokenSource(secret_file=tmp_path / "secret"))
    assert "no token can be signed with this secret" in problem


@pytest.mark.parametrize(("width", "lines"), [(80, 7), (120, 2)])
def test_narrow_terminal_shows_all_of_a_worker(width: int, lines: int) -> None:
    row = ("echo_server", "echo", "ws://localhost:8080", "examples.echo:handle", "ram", "search, query, echo", "none")
    console = Console(width=width, record=True, force_terminal=True, file=StringIO())
    show([row], console)
    text = console.export_text()
    assert len(text.splitlines()) == lines
    assert all(cell in text for cell in row)


@pytest.mark.parametrize("problem", [BrokenPipeError(32, "Broken pipe"), EOFError()])
def test_fork_server_that_cannot_start_anything_is_told(problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise problem

    monkeypatch.setattr(ForkServer, "_start_process", refuse)
    with pytest.raises(StartError, match=r"no process could be started: .*; may this user execute"):
        ForkServer().probe(HandlerRef("worker.echo", None, "handle", Path("/")))


def test_folder_that_this_user_may_not_enter_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", lambda: None)
    ForkServer().start()
    assert Path.cwd() == tmp_path
    monkeypatch.setattr("runner.process.os.access", lambda path, mode: False)
    ForkServer().start()
    assert Path.cwd() == Path("/")
