"""`shared.config`: good files become typed data, wrong ones become one line that says what to do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import load, parse_http_address, worker_name, worker_specs
from shared.errors import ConfigError
from shared.handlers import parse_handler
from shared.nodes import NodeAddress
from shared.tokens import Secret, TokenError

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cr3t-that-nobody-may-see-in-an-error"
AGENT = '[[agent]]\nname = "echo"\nhandler = "worker.echo:handle"\n'


class Wrong(NamedTuple):
    """A wrong configuration file, and what its error must say: the key path first, then the rest."""

    name: str
    text: str | bytes
    says: tuple[str, ...]
    beside: Mapping[str, str] = {}
    environ: Mapping[str, str] = {}


def agent(*lines: str) -> str:
    return AGENT + "\n".join(lines) + "\n"


def with_agent(*lines: str) -> str:
    return "\n".join(lines) + "\n" + AGENT


WRONG = [
    # --- the file
    Wrong("not_toml", "this is prose", ("is not TOML", "line 1")),
    Wrong("toml_cut_short", AGENT + "nodes = [", ("is not TOML",)),
    Wrong("not_utf8", b"\xff\xfe" + AGENT.encode(), ("is not UTF-8 text (byte 0)",)),
    Wrong("binary", bytes(range(256)), ("is not UTF-8",)),
    Wrong("empty", "", ("agent:", "found none", "expected at least one [[agent]]")),
    Wrong("nested_too_deeply", "a = " + "[" * 5000 + "]" * 5000, ("is nested too deeply",)),
    # --- keys
    Wrong("unknown_section", with_agent("[runnr]"), ("runnr: is not a known key", "did you mean 'runner'?")),
    Wrong("unknown_top_key", f'jwt = "{SECRET}"\n' + AGENT, ("jwt: is not a known key", "expected one of runner,")),
    Wrong("unknown_runner_key", with_agent("[runner]", "htpp = 1"), ("runner.htpp:", "did you mean 'http'?")),
    Wrong(
        "unknown_connection_key",
        with_agent("[connection]", "reconect_interval_ms = 1"),
        ("connection.reconect_interval_ms:", "did you mean 'reconnect_interval_ms'?"),
    ),
    Wrong(
        "unknown_supervision_key",
        with_agent("[supervision]", "max_restart = 1"),
        ("supervision.max_restart:", "did you mean 'max_restarts'?"),
    ),
    Wrong("unknown_agent_key", agent("handle = 1"), ("agent[0] (echo).handle:", "did you mean 'handler'?")),
    Wrong("unknown_key_like_none", agent("zzz = 1"), ("agent[0] (echo).zzz:", "expected one of name, handler,")),
    Wrong("key_with_a_newline", agent('"a\\nb" = 1'), ("agent[0] (echo).'a\\nb':", "is not a known key")),
    Wrong("section_is_no_table", "runner = 5\n" + AGENT, ("runner: found 5, expected a table",)),
    # --- the agents
    Wrong("one_bracket", AGENT.replace("[[agent]]", "[agent]"), ("agent: found one table", "write [[agent]]")),
    Wrong("agents_are_text", 'agent = "echo"', ("agent: found none",)),
    Wrong("agent_is_no_table", 'agent = ["echo"]', ("agent[0]: found 'echo', expected a table",)),
    Wrong("name_missing", '[[agent]]\nhandler = "a:b"', ("agent[0].name: is missing, expected a string",)),
    Wrong("handler_missing", '[[agent]]\nname = "a"', ("agent[0] (a).handler: is missing, expected a string",)),
    Wrong("name_empty", '[[agent]]\nname=""\nhandler="a:b"', ("agent[0].name: found ''", "expected 1 to 64 letters")),
    Wrong("name_with_a_slash", '[[agent]]\nname="a/b"\nhandler="a:b"', ("agent[0].name: found 'a/b'",)),
    Wrong("name_with_a_newline", '[[agent]]\nname="a\\nb"\nhandler="a:b"', ("agent[0].name: found 'a\\nb'",)),
    Wrong("name_too_long", f'[[agent]]\nname="{"a" * 65}"\nhandler="a:b"', ("agent[0].name: found",)),
    Wrong("name_is_a_number", '[[agent]]\nname=7\nhandler="a:b"', ("agent[0].name: found 7, expected a string",)),
    Wrong("name_twice", AGENT + AGENT, ("agent[1].name:", "two agents named 'echo'")),
    # --- types and bounds
    Wrong(
        "bool_for_int",
        with_agent("[runner]", "max_in_flight = true"),
        ("runner.max_in_flight: found True, expected a whole number from 1 to 65536",),
    ),
    Wrong(
        "float_for_int",
        with_agent("[connection]", "ping_interval_ms = 5.0"),
        ("connection.ping_interval_ms: found 5.0, expected a whole number from 1 to 86400000",),
    ),
    Wrong(
        "text_for_int",
        agent('connect_timeout_ms = "5000"'),
        ("agent[0] (echo).connect_timeout_ms: found '5000', expected a whole number",),
    ),
    Wrong(
        "negative",
        with_agent("[supervision]", "max_restarts = -1"),
        ("supervision.max_restarts: found -1, expected a whole number from 0 to 1000",),
    ),
    *(
        Wrong(
            f"token_{number}",
            with_agent("[runner]", f"http_token = {token}"),
            ("runner.http_token: found a token with characters that no HTTP header can hold", "openssl rand"),
        )
        for number, token in enumerate(('"caf\u00e9-caf\u00e9"', '"s3cr3t\\n"', '" s3cr3t"', '"s3\\u0007cr3t"'))
    ),
    Wrong(
        "zero",
        with_agent("[runner]", "query_timeout_ms = 0"),
        ("runner.query_timeout_ms: found 0, expected a whole number from 1",),
    ),
    Wrong(
        "beyond_64_bits",
        with_agent("[runner]", "query_timeout_ms = 99999999999999999999999"),
        ("runner.query_timeout_ms: found 99999999999999999999999",),
    ),
    Wrong("number_for_text", with_agent("[runner]", "http = 9600"), ("runner.http: found 9600, expected a string",)),
    Wrong("date_for_text", with_agent("[runner]", "http = 2020-01-01"), ("runner.http:", "expected a string")),
    Wrong("number_for_path", with_agent("[runner]", "state_dir = 1"), ("runner.state_dir: found 1, expected a path",)),
    Wrong("empty_path", agent('jwt_token_file = " "'), ("agent[0] (echo).jwt_token_file: found ' ', expected a path",)),
    Wrong("nul_in_path", with_agent("[runner]", 'state_dir = "\\u0000"'), ("runner.state_dir:", "expected a path")),
    Wrong(
        "home_of_nobody",
        with_agent("[runner]", 'state_dir = "~no-such-user-here/x"'),
        ("runner.state_dir: found '~no-such-user-here/x'", "write the whole path"),
    ),
    Wrong(
        "unknown_level",
        with_agent("[runner]", 'log_level = "warn"'),
        ("runner.log_level: found 'warn'", 'expected one of "debug", "info"', "did you mean 'warning'?"),
    ),
    Wrong(
        "unknown_memory",
        agent('memory = "ran"'),
        ("agent[0] (echo).memory: found 'ran'", 'expected one of "none", "ram"', "did you mean 'ram'?"),
    ),
    Wrong(
        "capabilities_are_text",
        agent('capabilities = "a"'),
        ("agent[0] (echo).capabilities: found 'a', expected a list of strings",),
    ),
    Wrong("capability_is_a_number", agent("capabilities = [1]"), ("agent[0] (echo).capabilities: found [1]",)),
    Wrong(
        "concurrency_with_memory",
        agent("concurrency = 4"),
        ("agent[0] (echo).concurrency: found 4, expected 1", 'memory = "none"'),
    ),
    Wrong("concurrency_zero", agent('memory = "none"', "concurrency = 0"), ("agent[0] (echo).concurrency: found 0",)),
    # --- addresses
    Wrong(
        "port_99999",
        with_agent("[runner]", 'http = "127.0.0.1:99999"'),
        ("runner.http: found '127.0.0.1:99999', expected HOST:PORT with a port from 0 to 65535",),
    ),
    Wrong("no_port", with_agent("[runner]", 'http = "127.0.0.1"'), ("runner.http: found '127.0.0.1', expected HOST:",)),
    Wrong(
        "open_to_others_without_a_token",
        with_agent("[runner]", 'http = "0.0.0.0:9600"'),
        ("runner.http: '0.0.0.0:9600' can be reached from other machines", "set runner.http_token_file"),
    ),
    Wrong(
        "name_that_looks_like_loopback",
        with_agent("[runner]", 'http = "127.example.com:9600"'),
        ("runner.http: '127.example.com:9600' can be reached from other machines",),
    ),
    Wrong("nodes_empty", agent("nodes = []"), ("agent[0] (echo).nodes: the list is empty",)),
    Wrong(
        "nodes_are_text", agent('nodes = "localhost"'), ("agent[0] (echo).nodes: found 'localhost', expected a list",)
    ),
    Wrong(
        "node_twice",
        agent('nodes = ["localhost", "LOCALHOST:8080"]'),
        ("agent[0] (echo).nodes: the node ws://localhost:8080 is named twice",),
    ),
    Wrong(
        "node_port_99999",
        agent('nodes = ["localhost:99999"]'),
        ("agent[0] (echo).nodes: 'localhost:99999' is not a node's address", "the port is '99999'"),
    ),
    Wrong(
        "node_scheme",
        agent('nodes = ["http://localhost"]'),
        ("agent[0] (echo).nodes: 'http://localhost'", "the scheme is 'http', expected ws or wss"),
    ),
    Wrong(
        "node_with_a_token",
        agent(f'nodes = ["ws://localhost:8080/ws?token={SECRET}"]'),
        ("agent[0] (echo).nodes: 'ws://localhost:8080/ws'?...", "a token goes into jwt_token_file"),
    ),
    Wrong("disco_port", AGENT, ("EM_DISCO_PORT: 'localhost:x'", "the port is 'x'"), environ={"EM_DISCO_PORT": "x"}),
    Wrong(
        "reconnect_ms",
        AGENT,
        ("EM_FILTER_RECONNECT_MS (environment): found '5s', expected a whole number from 1 to 86400000",),
        environ={"EM_FILTER_RECONNECT_MS": "5s"},
    ),
    Wrong(
        "reconnect_ms_of_5000_digits",
        AGENT,
        ("EM_FILTER_RECONNECT_MS (environment): found '999",),
        environ={"EM_FILTER_RECONNECT_MS": "9" * 5000},
    ),
    # --- handlers
    Wrong(
        "handler_without_attribute",
        AGENT.replace("worker.echo:handle", "worker.echo"),
        ("agent[0] (echo).handler: found 'worker.echo', expected module:attribute or path/to/file.py:attribute",),
    ),
    Wrong("handler_empty", AGENT.replace("worker.echo:handle", ""), ("agent[0] (echo).handler: found ''",)),
    Wrong("handler_no_module", AGENT.replace("worker.echo:", ":"), ("agent[0] (echo).handler: found ':handle'",)),
    Wrong(
        "handler_bad_attribute", AGENT.replace(":handle", ":1x"), ("agent[0] (echo).handler: found 'worker.echo:1x'",)
    ),
    Wrong(
        "handler_bad_module",
        AGENT.replace("worker.echo:", "my-agent:"),
        ("agent[0] (echo).handler: 'my-agent' is not a module's name", "path/to/file.py:handle"),
    ),
    Wrong(
        "handler_file_missing",
        AGENT.replace("worker.echo:", "gone/echo.py:"),
        ("agent[0] (echo).handler: there is no file", "gone/echo.py"),
    ),
    Wrong(
        "handler_file_name_too_long",
        AGENT.replace("worker.echo:", "x" * 300 + ".py:"),
        ("agent[0] (echo).handler: cannot look for", "File name too long"),
    ),
    Wrong(
        "module_that_hides_ours",
        AGENT,
        ("agent[0] (echo).handler:", "worker.py has the name of one of em-runner's own packages", "rename it"),
        beside={"worker.py": ""},
    ),
    Wrong(
        "package_that_hides_ours",
        AGENT,
        ("agent[0] (echo).handler:", "shared has the name of one of em-runner's own packages"),
        beside={"shared/__init__.py": ""},
    ),
    Wrong(
        "file_beside_a_module_that_hides_ours",
        AGENT.replace("worker.echo:", "own/echo.py:"),
        ("agent[0] (echo).handler:", "own/disco.py has the name"),
        beside={"own/echo.py": "", "own/disco.py": ""},
    ),
    # --- tokens
    Wrong(
        "two_kinds_of_token",
        agent(f'jwt_token = "{SECRET}"', 'jwt_token_file = "t"'),
        ("agent[0] (echo): found jwt_token and jwt_token_file, expected only one of them",),
    ),
    Wrong(
        "two_kinds_of_token_for_all",
        with_agent("[connection]", f'jwt_token = "{SECRET}"', 'jwt_secret_file = "t"'),
        ("connection: found jwt_token and jwt_secret_file, expected only one of them",),
    ),
    Wrong("token_is_a_number", agent("jwt_token = 31337"), ("agent[0] (echo).jwt_token: found a int (not shown)",)),
    Wrong(
        "token_in_a_list",
        agent(f'jwt_token = ["{SECRET}"]'),
        ("agent[0] (echo).jwt_token: found a list (not shown), expected a string",),
    ),
    Wrong("token_empty", agent('jwt_token = " "'), ("agent[0] (echo).jwt_token: found an empty text",)),
    Wrong("token_not_toml", agent(f'jwt_token = "{SECRET}'), ("is not TOML",)),
    Wrong(
        "secret_file_missing",
        agent('jwt_secret_file = "no.secret"'),
        ("agent[0] (echo).jwt_secret_file: there is no file", "no.secret"),
    ),
    Wrong(
        "secret_file_missing_for_all",
        with_agent("[connection]", 'jwt_secret_file = "no.secret"'),
        ("connection.jwt_secret_file: there is no file", "no.secret"),
    ),
    Wrong(
        "ca_file_missing",
        with_agent("[connection]", 'tls_ca_file = "ca.pem"'),
        ("connection.tls_ca_file: there is no file", "ca.pem"),
    ),
    Wrong(
        "own_ca_file_missing",
        agent('tls_ca_file = "ca.pem"'),
        ("agent[0] (echo).tls_ca_file: there is no file", "ca.pem"),
    ),
    Wrong(
        "two_http_tokens",
        with_agent("[runner]", f'http_token = "{SECRET}"', 'http_token_file = "t"'),
        ("runner: found http_token and http_token_file, expected only one of them",),
    ),
    Wrong("http_token_empty", with_agent("[runner]", 'http_token = ""'), ("runner.http_token: found an empty text",)),
    Wrong(
        "http_token_is_a_table", with_agent("[runner]", "http_token = {a=1}"), ("runner.http_token: found a dict (not",)
    ),
    Wrong(
        "http_token_file_missing",
        with_agent("[runner]", 'http_token_file = "gone"'),
        ("runner.http_token_file: cannot read", "gone", "No such file"),
    ),
    Wrong(
        "http_token_file_empty",
        with_agent("[runner]", 'http_token_file = "blank"'),
        ("runner.http_token_file:", "blank is empty"),
        beside={"blank": " \n"},
    ),
]

THROUGH_THE_COMMAND = [
    "not_toml",
    "not_utf8",
    "empty",
    "nested_too_deeply",
    "unknown_agent_key",
    "key_with_a_newline",
    "one_bracket",
    "name_twice",
    "bool_for_int",
    "port_99999",
    "open_to_others_without_a_token",
    "nodes_empty",
    "node_with_a_token",
    "reconnect_ms_of_5000_digits",
    "handler_without_attribute",
    "handler_file_name_too_long",
    "module_that_hides_ours",
    "two_kinds_of_token",
    "home_of_nobody",
    "http_token_file_empty",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the configuration is; it has no emergence.conf."""
    return tmp_path


def write(folder: Path, text: str | bytes, beside: Mapping[str, str] | None = None) -> Path:
    for name, content in (beside or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    file = folder / "em-runner.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def read(folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None, **beside: str):
    file = write(folder, text, beside)
    return load(file, environ=environ or {}, emergence_conf=folder / "no-emergence.conf")


def test_there_are_at_least_thirty_wrong_files_each_told_apart() -> None:
    assert len({wrong.name for wrong in WRONG}) == len(WRONG) >= 30
    assert set(THROUGH_THE_COMMAND) <= {wrong.name for wrong in WRONG}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_file_is_one_line_that_names_the_file_and_the_key(wrong: Wrong, folder: Path) -> None:
    file = write(folder, wrong.text, wrong.beside)
    with pytest.raises(ConfigError) as caught:
        load(file, environ=wrong.environ, emergence_conf=folder / "none")
    told = str(caught.value)
    assert told.startswith(f"{file}: {wrong.says[0]}")
    for part in wrong.says:
        assert part in told
    assert told.isprintable(), "one line, and nothing that moves a terminal's cursor"
    assert len(told) < 700
    assert SECRET not in told


def test_wrong_files_end_the_command_with_78_and_one_line(tmp_path: Path) -> None:
    chosen = [wrong for wrong in WRONG if wrong.name in THROUGH_THE_COMMAND]
    assert len(chosen) >= 20

    def checked(wrong: Wrong) -> Path:
        (tmp_path / wrong.name).mkdir()
        return write(tmp_path / wrong.name, wrong.text, wrong.beside)

    files = {wrong.name: checked(wrong) for wrong in chosen}
    found = run_checks([(files[wrong.name], wrong.environ) for wrong in chosen], tmp_path)
    for wrong, done in zip(chosen, found, strict=True):
        assert_refused(done, str(files[wrong.name]), *wrong.says)


CHECKS = """
import os, sys, tempfile
from runner.cli import main
def check(file, environ):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (pid := os.fork()) == 0:
            os.environ.update(environ)
            sys.argv = ["em-runner", "check", "-c", file]
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = 0
            try:
                main()
            except SystemExit as exc:
                status = exc.code
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0), err.seek(0)
        return status, out.read().decode(), err.read().decode()
print([check(*each) for each in eval(sys.stdin.read())])
"""
"""A process that has imported the command once, and is the command in a copy of itself for each file."""


def run_checks(files: Sequence[tuple[Path, Mapping[str, str]]], home: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run `em-runner check` for each file, with some variables."""
    done = subprocess.run(
        [sys.executable, "-c", CHECKS],
        input=repr([(str(file), dict(environ)) for file, environ in files]),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [subprocess.CompletedProcess("check", *found) for found in ast.literal_eval(done.stdout)]


def run_check(file: Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", "check", "-c", str(file)]
    variables = {"PATH": os.environ["PATH"], "HOME": str(home)}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 78, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("em-runner: ")
    for part in says:
        assert part in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert SECRET not in done.stderr + done.stdout


def test_handler_that_cannot_be_imported_ends_the_command_with_78_and_one_line(tmp_path: Path) -> None:
    file = write(tmp_path, AGENT.replace("worker.echo", "broken"), {"broken.py": "\n\nimport no_such_module_at_all\n"})
    done = run_check(file, tmp_path)
    assert_refused(done, "agent 'echo'", "no_such_module_at_all", "broken.py, line 3")


def test_check_says_where_nodes_were_found_that_an_agent_does_not_name(tmp_path: Path) -> None:
    file = write(tmp_path, AGENT)
    (tmp_path / "own").mkdir()
    own = write(tmp_path / "own", AGENT + 'nodes = ["localhost:9000"]\n')
    conf = tmp_path / "user" / ".config" / "emergence" / "emergence.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("[em_disco]\nnodes = localhost:9001\n")
    environs = [{"EM_DISCO_HOST": "localhost"}, {"EM_DISCO_PORT": "9002"}, {"HOME": str(tmp_path / "user")}, {}]
    *found, by_itself = run_checks([*((file, environ) for environ in environs), (own, {})], tmp_path)
    for done, node in zip(
        found,
        (
            "ws://localhost:8080 (EM_DISCO_HOST)",
            "ws://localhost:9002 (EM_DISCO_PORT)",
            f"ws://localhost:9001 ({conf})",
            "ws://localhost:8080 (the default)",
        ),
        strict=True,
    ):
        assert f" {node} " in done.stdout, done
    assert "ws://localhost:9000 " in by_itself.stdout
    assert "(" not in by_itself.stdout, "it names its node itself"


def test_folder_instead_of_a_file_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{folder}: cannot be read: Is a directory$"):
        load(folder)


def test_missing_file_is_told_with_what_to_do(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file; name one with -c"):
        load(folder / "gone.toml")


def test_agent_of_three_lines_has_the_defaults_of_the_reference(folder: Path) -> None:
    config = read(folder, AGENT)
    (echo,) = config.agents
    assert (echo.name, str(echo.handler), echo.memory, echo.concurrency) == ("echo", "worker.echo:handle", "ram", 1)
    assert echo.capabilities is None, "the handler's own hold"
    assert echo.nodes == (NodeAddress("localhost", 8080, False),)
    assert echo.nodes_origin == "the default"
    connection = echo.connection
    assert connection.reconnect_interval_ms == connection.connect_timeout_ms == connection.upgrade_timeout_ms == 5000
    assert connection.ping_interval_ms == 20_000
    assert echo.token.describe() == "none"
    assert str(config.http) == "127.0.0.1:9600"
    assert config.http_token is None
    assert (config.query_timeout_ms, config.max_in_flight) == (30_000, 1024)
    supervision = config.supervision
    assert (supervision.max_restarts, supervision.restart_window_s, supervision.shutdown_timeout_ms) == (10, 60, 5000)


def test_file_with_a_byte_order_mark_is_read(folder: Path) -> None:
    assert read(folder, b"\xef\xbb\xbf" + AGENT.encode()).agents[0].name == "echo"


def test_empty_list_of_capabilities_is_not_the_handlers_own(folder: Path) -> None:
    assert read(folder, agent("capabilities = []")).agents[0].capabilities == ()


def test_agent_overrides_the_connection_for_itself_alone(folder: Path) -> None:
    text = with_agent("[connection]", "ping_interval_ms = 111", "connect_timeout_ms = 222") + (
        "ping_interval_ms = 333\n" + AGENT.replace('"echo"', '"other"')
    )
    echo, other = read(folder, text).agents
    assert (echo.connection.ping_interval_ms, echo.connection.connect_timeout_ms) == (333, 222)
    assert (other.connection.ping_interval_ms, other.connection.connect_timeout_ms) == (111, 222)


@pytest.mark.parametrize(
    ("of_agent", "of_all", "variable", "expected"),
    [
        ("1", "2", "3", 1),
        (None, "2", "3", 2),
        ("1", None, "3", 1),
        (None, None, "3", 3),
        (None, None, " ", 5000),
        (None, "5000", "3", 5000),
        (None, None, None, 5000),
    ],
)
def test_reconnect_interval_is_the_agents_then_the_files_then_the_environments(
    of_agent: str | None, of_all: str | None, variable: str | None, expected: int, folder: Path
) -> None:
    text = (
        ("" if of_all is None else f"[connection]\nreconnect_interval_ms = {of_all}\n")
        + AGENT
        + ("" if of_agent is None else f"reconnect_interval_ms = {of_agent}\n")
    )
    environ = {} if variable is None else {"EM_FILTER_RECONNECT_MS": variable}
    assert read(folder, text, environ).agents[0].connection.reconnect_interval_ms == expected


@pytest.mark.parametrize(
    ("of_agent", "of_all", "variable", "expected"),
    [
        ("own", "all", "env", "own"),
        (None, "all", "env", "all"),
        ("own", None, None, "own"),
        (None, None, "env", "env"),
        (None, None, " ", None),
        (None, None, None, None),
    ],
)
def test_token_is_the_agents_then_the_files_then_the_environments(
    of_agent: str | None, of_all: str | None, variable: str | None, expected: str | None, folder: Path
) -> None:
    text = (
        ("" if of_all is None else f'[connection]\njwt_token = " {of_all}\\n"\n')
        + AGENT
        + ("" if of_agent is None else f'jwt_token = "{of_agent}"\n')
    )
    environ = {} if variable is None else {"EM_FILTER_JWT_TOKEN": variable}
    source = read(folder, text, environ).agents[0].token
    assert source.read("echo", environ) == expected
    assert str(expected) not in repr(source) or expected is None


def test_token_kinds_of_agent_and_connection_do_not_clash(folder: Path) -> None:
    text = with_agent("[connection]", 'jwt_token = "all"') + 'jwt_token_file = "own.jwt"\n'
    assert read(folder, text).agents[0].token.token_file == folder / "own.jwt"


def test_token_file_may_be_written_after_the_start(folder: Path) -> None:
    source = read(folder, agent('jwt_token_file = "later.jwt"')).agents[0].token
    with pytest.raises(TokenError, match=r"later\.jwt"):
        source.read("echo")
    (folder / "later.jwt").write_text("fresh\n")
    assert source.read("echo") == "fresh"


def test_relative_paths_are_relative_to_the_file_and_absolute_ones_are_kept(folder: Path) -> None:
    text = (
        '[runner]\nstate_dir = "state"\nhttp_token_file = "t/http"\n'
        f'[connection]\njwt_secret_file = "{folder}/elsewhere/secret"\ntls_ca_file = "ca.pem"\n'
        '[[agent]]\nname = "a"\nhandler = "own/a.py:handle"\n'
    )
    beside = {"t/http": "tok\n", "elsewhere/secret": "x" * 32, "ca.pem": "-", "own/a.py": ""}
    config = read(folder, text, **beside)
    (found,) = config.agents
    assert config.state_dir == folder / "state"
    assert config.http_token == Secret("tok")
    assert found.token.secret_file == folder / "elsewhere/secret"
    assert found.connection.tls_ca_file == folder / "ca.pem"
    assert (found.handler.file, found.handler.search_dir) == (folder / "own/a.py", folder / "own")


def test_relative_configuration_path_still_gives_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, with_agent("[runner]", 'state_dir = "state"'))
    monkeypatch.chdir(folder)
    config = load(Path("em-runner.toml"), environ={}, emergence_conf=folder / "none")
    assert config.state_dir == folder / "state"
    assert config.agents[0].handler.search_dir == folder


def test_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    config = read(folder, with_agent("[runner]", 'state_dir = "~/state"') + 'jwt_token_file = "~/t.jwt"\n')
    assert config.state_dir == folder / "home/state"
    assert config.agents[0].token.token_file == folder / "home/t.jwt"
    assert read(folder, AGENT).state_dir == folder / "home/.local/state/em-runner"


def test_address_open_to_others_is_allowed_with_a_token(folder: Path) -> None:
    config = read(folder, with_agent("[runner]", 'http = "0.0.0.0:80"', f'http_token = "{SECRET}"'))
    assert not config.http.loopback
    assert config.http_token == Secret(SECRET)
    assert SECRET not in repr(config)


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:9600", "127.0.0.1", 9600, True),
        ("127.0.0.53:1", "127.0.0.53", 1, True),
        ("localhost:0", "localhost", 0, True),
        ("[::1]:9600", "::1", 9600, True),
        ("[::]:9600", "::", 9600, False),
        ("0.0.0.0:65535", "0.0.0.0", 65535, False),
        ("127.0.0.1.example.com:80", "127.0.0.1.example.com", 80, False),
        ("my-host:80", "my-host", 80, False),
    ],
)
def test_http_address_is_read_and_knows_whether_others_can_reach_it(
    text: str, host: str, port: int, loopback: bool
) -> None:
    address = parse_http_address(text)
    assert (address.host, address.port, address.loopback, str(address)) == (host, port, loopback, text)


@pytest.mark.parametrize(
    "text", ["", ":80", "h:", "h:x", "h:-1", "h:65536", "h:080000", "::1:80", "[::1]", "a b:1", "h:1\n"]
)
def test_http_address_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        parse_http_address(text)


def refusal(function: Callable[..., object], *arguments: object) -> str:
    """Return the text of the ConfigError, or an empty one."""
    try:
        function(*arguments)
    except ConfigError as exc:
        return str(exc)
    return ""


@given(st.text())
def test_any_http_address_is_read_or_refused_in_one_line(text: str) -> None:
    assert refusal(parse_http_address, text).isprintable()


@given(st.text())
def test_any_handler_text_is_read_or_refused(text: str) -> None:
    assert "\n" not in refusal(parse_handler, text, Path("/nowhere"))


def test_folder_of_our_own_packages_hides_nothing() -> None:
    assert parse_handler("worker.echo:handle", ROOT).module == "worker.echo"


def test_folder_that_bears_our_name_without_python_in_it_hides_nothing(folder: Path) -> None:
    (folder / "shared").mkdir()
    assert read(folder, AGENT).agents[0].name == "echo"


def test_there_is_one_worker_for_each_agent_and_node_in_the_order_of_the_file(folder: Path) -> None:
    text = agent('nodes = ["localhost", "h:9"]') + AGENT.replace('"echo"', '"b"')
    text = '[runner]\nlog_level = "debug"\n[supervision]\nshutdown_timeout_ms = 7\n' + text
    specs = worker_specs(read(folder, text))
    assert [(spec.name, str(spec.node), spec.index) for spec in specs] == [
        ("echo_server", "ws://localhost:8080", 1),
        ("echo_server_2", "ws://h:9", 2),
        ("b_server", "ws://localhost:8080", 1),
    ]
    assert {(spec.shutdown_timeout_ms, spec.log_level) for spec in specs} == {(7, "debug")}


def test_third_worker_is_numbered_as_the_reference_does() -> None:
    assert [worker_name("a", index) for index in (1, 2, 3)] == ["a_server", "a_server_2", "a_server_3"]
