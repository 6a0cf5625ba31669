"""`shared.config.load`: valid files become typed data, invalid files become one-line errors."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config.handlers import parse_handler
from shared.config.load import load, parse_http_address, worker_name, worker_specs
from shared.config.nodes import NodeAddress
from shared.config.tokens import Secret, TokenError, TokenSource
from shared.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]
SECRET = "s3cr3t-that-must-be-in-no-error"
AGENT = '[[agent]]\nname = "echo"\nhandler = "worker.echo:handle"\n'


class Invalid(NamedTuple):
    """An invalid configuration file, and the parts of its error, with the key path first."""

    name: str
    text: str | bytes
    expected: tuple[str, ...]
    beside: Mapping[str, str] = {}
    environ: Mapping[str, str] = {}


def agent(*lines: str) -> str:
    return AGENT + "\n".join(lines) + "\n"


def with_agent(*lines: str) -> str:
    return "\n".join(lines) + "\n" + AGENT


INVALID = [
    # --- the file
    Invalid("not_toml", "this is prose", ("is not TOML", "line 1")),
    Invalid("toml_cut_short", AGENT + "nodes = [", ("is not TOML",)),
    Invalid("not_utf8", b"\xff\xfe" + AGENT.encode(), ("is not UTF-8 text (byte 0)",)),
    Invalid("binary", bytes(range(256)), ("is not UTF-8",)),
    Invalid("empty", "", ("agent:", "found none", "expected at least one [[agent]]")),
    Invalid("nested_too_deeply", "a = " + "[" * 5000 + "]" * 5000, ("is nested too deeply",)),
    # --- keys
    Invalid(
        "unknown_section",
        with_agent("[runnr]"),
        ("runnr: is not a known key", "did you mean 'runner'?"),
    ),
    Invalid(
        "unknown_top_key",
        f'jwt = "{SECRET}"\n' + AGENT,
        ("jwt: is not a known key", "expected one of runner,"),
    ),
    Invalid(
        "unknown_runner_key",
        with_agent("[runner]", "htpp = 1"),
        ("runner.htpp:", "did you mean 'http'?"),
    ),
    Invalid(
        "unknown_connection_key",
        with_agent("[connection]", "reconect_interval_ms = 1"),
        ("connection.reconect_interval_ms:", "did you mean 'reconnect_interval_ms'?"),
    ),
    Invalid(
        "unknown_supervision_key",
        with_agent("[supervision]", "max_restart = 1"),
        ("supervision.max_restart:", "did you mean 'max_restarts'?"),
    ),
    Invalid(
        "unknown_agent_key",
        agent("handle = 1"),
        ("agent[0] (echo).handle:", "did you mean 'handler'?"),
    ),
    Invalid(
        "unknown_key_without_a_similar_one",
        agent("zzz = 1"),
        ("agent[0] (echo).zzz:", "expected one of name, handler,"),
    ),
    Invalid(
        "key_with_a_newline",
        agent('"a\\nb" = 1'),
        ("agent[0] (echo).'a\\nb':", "is not a known key"),
    ),
    Invalid(
        "section_is_not_a_table", "runner = 5\n" + AGENT, ("runner: found 5, expected a table",)
    ),
    # --- the agents
    Invalid(
        "one_bracket",
        AGENT.replace("[[agent]]", "[agent]"),
        ("agent: found one table", "write [[agent]]"),
    ),
    Invalid("agents_are_text", 'agent = "echo"', ("agent: found none",)),
    Invalid(
        "agent_is_not_a_table", 'agent = ["echo"]', ("agent[0]: found 'echo', expected a table",)
    ),
    Invalid(
        "name_missing",
        '[[agent]]\nhandler = "a:b"',
        ("agent[0].name: is missing, expected a string",),
    ),
    Invalid(
        "handler_missing",
        '[[agent]]\nname = "a"',
        ("agent[0] (a).handler: is missing, expected a string",),
    ),
    Invalid(
        "name_empty",
        '[[agent]]\nname=""\nhandler="a:b"',
        ("agent[0].name: found ''", "expected 1 to 64 letters"),
    ),
    Invalid(
        "name_with_a_slash", '[[agent]]\nname="a/b"\nhandler="a:b"', ("agent[0].name: found 'a/b'",)
    ),
    Invalid(
        "name_with_a_newline",
        '[[agent]]\nname="a\\nb"\nhandler="a:b"',
        ("agent[0].name: found 'a\\nb'",),
    ),
    Invalid(
        "name_too_long", f'[[agent]]\nname="{"a" * 65}"\nhandler="a:b"', ("agent[0].name: found",)
    ),
    Invalid(
        "name_is_a_number",
        '[[agent]]\nname=7\nhandler="a:b"',
        ("agent[0].name: found 7, expected a string",),
    ),
    Invalid("name_twice", AGENT + AGENT, ("agent[1].name:", "two agents named 'echo'")),
    # --- types and bounds
    Invalid(
        "bool_for_int",
        with_agent("[runner]", "max_in_flight = true"),
        ("runner.max_in_flight: found True, expected a whole number from 1 to 65536",),
    ),
    Invalid(
        "float_for_int",
        with_agent("[connection]", "ping_interval_ms = 5.0"),
        ("connection.ping_interval_ms: found 5.0, expected a whole number from 1 to 86400000",),
    ),
    Invalid(
        "text_for_int",
        agent('connect_timeout_ms = "5000"'),
        ("agent[0] (echo).connect_timeout_ms: found '5000', expected a whole number",),
    ),
    Invalid(
        "negative",
        with_agent("[supervision]", "max_restarts = -1"),
        ("supervision.max_restarts: found -1, expected a whole number from 0 to 1000",),
    ),
    *(
        Invalid(
            f"token_{number}",
            with_agent("[runner]", f"http_token = {token}"),
            (
                "runner.http_token: found a token with characters that no HTTP header can hold",
                "openssl rand",
            ),
        )
        for number, token in enumerate(
            ('"caf\u00e9-caf\u00e9"', '"s3cr3t\\n"', '" s3cr3t"', '"s3\\u0007cr3t"')
        )
    ),
    Invalid(
        "zero",
        with_agent("[runner]", "query_timeout_ms = 0"),
        ("runner.query_timeout_ms: found 0, expected a whole number from 1",),
    ),
    Invalid(
        "beyond_64_bits",
        with_agent("[runner]", "query_timeout_ms = 99999999999999999999999"),
        ("runner.query_timeout_ms: found 99999999999999999999999",),
    ),
    Invalid(
        "number_for_text",
        with_agent("[runner]", "http = 9600"),
        ("runner.http: found 9600, expected a string",),
    ),
    Invalid(
        "date_for_text",
        with_agent("[runner]", "http = 2020-01-01"),
        ("runner.http:", "expected a string"),
    ),
    Invalid(
        "number_for_path",
        with_agent("[runner]", "state_dir = 1"),
        ("runner.state_dir: found 1, expected a path",),
    ),
    Invalid(
        "empty_path",
        agent('jwt_token_file = " "'),
        ("agent[0] (echo).jwt_token_file: found ' ', expected a path",),
    ),
    Invalid(
        "nul_in_path",
        with_agent("[runner]", 'state_dir = "\\u0000"'),
        ("runner.state_dir:", "expected a path"),
    ),
    Invalid(
        "home_of_an_unknown_user",
        with_agent("[runner]", 'state_dir = "~no-such-user-here/x"'),
        ("runner.state_dir: found '~no-such-user-here/x'", "write the whole path"),
    ),
    Invalid(
        "unknown_level",
        with_agent("[runner]", 'log_level = "warn"'),
        (
            "runner.log_level: found 'warn'",
            'expected one of "debug", "info"',
            "did you mean 'warning'?",
        ),
    ),
    Invalid(
        "unknown_memory",
        agent('memory = "ran"'),
        (
            "agent[0] (echo).memory: found 'ran'",
            'expected one of "none", "ram"',
            "did you mean 'ram'?",
        ),
    ),
    Invalid(
        "capabilities_are_text",
        agent('capabilities = "a"'),
        ("agent[0] (echo).capabilities: found 'a', expected a list of strings",),
    ),
    Invalid(
        "capability_is_a_number",
        agent("capabilities = [1]"),
        ("agent[0] (echo).capabilities: found [1]",),
    ),
    Invalid(
        "concurrency_with_memory",
        agent("concurrency = 4"),
        ("agent[0] (echo).concurrency: found 4, expected 1", 'memory = "none"'),
    ),
    Invalid(
        "concurrency_zero",
        agent('memory = "none"', "concurrency = 0"),
        ("agent[0] (echo).concurrency: found 0",),
    ),
    # --- addresses
    Invalid(
        "port_99999",
        with_agent("[runner]", 'http = "127.0.0.1:99999"'),
        ("runner.http: found '127.0.0.1:99999', expected HOST:PORT with a port from 0 to 65535",),
    ),
    Invalid(
        "port_missing",
        with_agent("[runner]", 'http = "127.0.0.1"'),
        ("runner.http: found '127.0.0.1', expected HOST:",),
    ),
    Invalid(
        "open_to_others_without_a_token",
        with_agent("[runner]", 'http = "0.0.0.0:9600"'),
        (
            "runner.http: '0.0.0.0:9600' can be reached from other machines",
            "set runner.http_token_file",
        ),
    ),
    Invalid(
        "name_that_looks_like_loopback",
        with_agent("[runner]", 'http = "127.example.com:9600"'),
        ("runner.http: '127.example.com:9600' can be reached from other machines",),
    ),
    Invalid("nodes_empty", agent("nodes = []"), ("agent[0] (echo).nodes: the list is empty",)),
    Invalid(
        "nodes_are_text",
        agent('nodes = "localhost"'),
        ("agent[0] (echo).nodes: found 'localhost', expected a list",),
    ),
    Invalid(
        "node_twice",
        agent('nodes = ["localhost", "LOCALHOST:8080"]'),
        ("agent[0] (echo).nodes: the node ws://localhost:8080 is named twice",),
    ),
    Invalid(
        "node_port_99999",
        agent('nodes = ["localhost:99999"]'),
        ("agent[0] (echo).nodes: 'localhost:99999' is not a node's address", "the port is '99999'"),
    ),
    Invalid(
        "node_scheme",
        agent('nodes = ["http://localhost"]'),
        ("agent[0] (echo).nodes: 'http://localhost'", "the scheme is 'http', expected ws or wss"),
    ),
    Invalid(
        "node_with_a_token",
        agent(f'nodes = ["ws://localhost:8080/ws?token={SECRET}"]'),
        ("agent[0] (echo).nodes: 'ws://localhost:8080/ws'?...", "set a token with jwt_token_file"),
    ),
    Invalid(
        "disco_port",
        AGENT,
        ("EM_DISCO_PORT: 'localhost:x'", "the port is 'x'"),
        environ={"EM_DISCO_PORT": "x"},
    ),
    Invalid(
        "reconnect_ms",
        AGENT,
        (
            "EM_FILTER_RECONNECT_MS (environment): found '5s', "
            "expected a whole number from 1 to 86400000",
        ),
        environ={"EM_FILTER_RECONNECT_MS": "5s"},
    ),
    Invalid(
        "reconnect_ms_of_5000_digits",
        AGENT,
        ("EM_FILTER_RECONNECT_MS (environment): found '999",),
        environ={"EM_FILTER_RECONNECT_MS": "9" * 5000},
    ),
    # --- handlers
    Invalid(
        "handler_without_attribute",
        AGENT.replace("worker.echo:handle", "worker.echo"),
        (
            "agent[0] (echo).handler: found 'worker.echo', "
            "expected module:attribute or path/to/file.py:attribute",
        ),
    ),
    Invalid(
        "handler_empty",
        AGENT.replace("worker.echo:handle", ""),
        ("agent[0] (echo).handler: found ''",),
    ),
    Invalid(
        "handler_without_module",
        AGENT.replace("worker.echo:", ":"),
        ("agent[0] (echo).handler: found ':handle'",),
    ),
    Invalid(
        "handler_bad_attribute",
        AGENT.replace(":handle", ":1x"),
        ("agent[0] (echo).handler: found 'worker.echo:1x'",),
    ),
    Invalid(
        "handler_bad_module",
        AGENT.replace("worker.echo:", "my-agent:"),
        (
            "agent[0] (echo).handler: 'my-agent' is not the name of a module",
            "path/to/file.py:handle",
        ),
    ),
    Invalid(
        "handler_file_missing",
        AGENT.replace("worker.echo:", "gone/echo.py:"),
        ("agent[0] (echo).handler: there is no file", "gone/echo.py"),
    ),
    Invalid(
        "handler_file_name_too_long",
        AGENT.replace("worker.echo:", "x" * 300 + ".py:"),
        ("agent[0] (echo).handler: cannot look for", "File name too long"),
    ),
    Invalid(
        "module_that_hides_a_package",
        AGENT,
        (
            "agent[0] (echo).handler:",
            "worker.py has the name of one of em-runner's own packages",
            "rename it",
        ),
        beside={"worker.py": ""},
    ),
    Invalid(
        "package_that_hides_a_package",
        AGENT,
        ("agent[0] (echo).handler:", "shared has the name of one of em-runner's own packages"),
        beside={"shared/__init__.py": ""},
    ),
    Invalid(
        "file_beside_a_module_that_hides_a_package",
        AGENT.replace("worker.echo:", "own/echo.py:"),
        ("agent[0] (echo).handler:", "own/disco.py has the name"),
        beside={"own/echo.py": "", "own/disco.py": ""},
    ),
    # --- tokens
    Invalid(
        "two_kinds_of_token",
        agent(f'jwt_token = "{SECRET}"', 'jwt_token_file = "t"'),
        ("agent[0] (echo): found jwt_token and jwt_token_file, expected only one of them",),
    ),
    Invalid(
        "two_kinds_of_token_for_all",
        with_agent("[connection]", f'jwt_token = "{SECRET}"', 'jwt_secret_file = "t"'),
        ("connection: found jwt_token and jwt_secret_file, expected only one of them",),
    ),
    Invalid(
        "token_is_a_number",
        agent("jwt_token = 31337"),
        ("agent[0] (echo).jwt_token: found a value that is not shown",),
    ),
    Invalid(
        "token_in_a_list",
        agent(f'jwt_token = ["{SECRET}"]'),
        ("agent[0] (echo).jwt_token: found a value that is not shown, expected a string",),
    ),
    Invalid(
        "token_empty", agent('jwt_token = " "'), ("agent[0] (echo).jwt_token: found an empty text",)
    ),
    Invalid("token_not_toml", agent(f'jwt_token = "{SECRET}'), ("is not TOML",)),
    Invalid(
        "secret_file_missing",
        agent('jwt_secret_file = "no.secret"'),
        ("agent[0] (echo).jwt_secret_file: there is no file", "no.secret"),
    ),
    Invalid(
        "secret_file_missing_for_all",
        with_agent("[connection]", 'jwt_secret_file = "no.secret"'),
        ("connection.jwt_secret_file: there is no file", "no.secret"),
    ),
    Invalid(
        "ca_file_missing",
        with_agent("[connection]", 'tls_ca_file = "ca.pem"'),
        ("connection.tls_ca_file: there is no file", "ca.pem"),
    ),
    Invalid(
        "own_ca_file_missing",
        agent('tls_ca_file = "ca.pem"'),
        ("agent[0] (echo).tls_ca_file: there is no file", "ca.pem"),
    ),
    Invalid(
        "two_http_tokens",
        with_agent("[runner]", f'http_token = "{SECRET}"', 'http_token_file = "t"'),
        ("runner: found http_token and http_token_file, expected only one of them",),
    ),
    Invalid(
        "http_token_empty",
        with_agent("[runner]", 'http_token = ""'),
        ("runner.http_token: found an empty text",),
    ),
    Invalid(
        "http_token_is_a_table",
        with_agent("[runner]", "http_token = {a=1}"),
        ("runner.http_token: found a value that is not shown",),
    ),
    Invalid(
        "http_token_file_missing",
        with_agent("[runner]", 'http_token_file = "gone"'),
        ("runner.http_token_file: cannot read", "gone", "No such file"),
    ),
    Invalid(
        "http_token_file_empty",
        with_agent("[runner]", 'http_token_file = "blank"'),
        ("runner.http_token_file:", "blank is empty"),
        beside={"blank": " \n"},
    ),
]

CHECKED_BY_THE_COMMAND = [
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
    "module_that_hides_a_package",
    "two_kinds_of_token",
    "home_of_an_unknown_user",
    "http_token_file_empty",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the configuration, without an emergence.conf."""
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


def test_at_least_thirty_invalid_files_have_unique_names() -> None:
    assert len({invalid.name for invalid in INVALID}) == len(INVALID) >= 30
    assert set(CHECKED_BY_THE_COMMAND) <= {invalid.name for invalid in INVALID}


def error_of(invalid: Invalid, folder: Path) -> str:
    """Return the message for an invalid file in a folder."""
    file = write(folder, invalid.text, invalid.beside)
    with pytest.raises(ConfigError) as caught:
        load(file, environ=invalid.environ, emergence_conf=folder / "none")
    return str(caught.value)


@pytest.mark.parametrize("invalid", INVALID, ids=lambda invalid: invalid.name)
def test_error_for_an_invalid_file_is_one_line_without_secrets(
    invalid: Invalid, folder: Path
) -> None:
    message = error_of(invalid, folder)
    assert message.startswith(f"{folder}/em-runner.toml: ")
    assert message.isprintable(), "it has a newline or a control character"
    assert len(message) < 700
    assert SECRET not in message


@pytest.mark.message_text
@pytest.mark.parametrize("invalid", INVALID, ids=lambda invalid: invalid.name)
def test_message_for_an_invalid_file_names_key_and_fault(invalid: Invalid, folder: Path) -> None:
    message = error_of(invalid, folder)
    assert message.startswith(f"{folder}/em-runner.toml: {invalid.expected[0]}")
    for part in invalid.expected:
        assert part in message


def test_check_of_an_invalid_file_exits_with_78_and_prints_the_error(tmp_path: Path) -> None:
    chosen = [invalid for invalid in INVALID if invalid.name in CHECKED_BY_THE_COMMAND]
    assert len(chosen) >= 20
    errors = []
    for invalid in chosen:
        (tmp_path / invalid.name).mkdir()
        errors.append(error_of(invalid, tmp_path / invalid.name))
    files = [tmp_path / invalid.name / "em-runner.toml" for invalid in chosen]
    environs = [invalid.environ for invalid in chosen]
    found = run_checks(list(zip(files, environs, strict=True)), tmp_path)
    for done, error in zip(found, errors, strict=True):
        assert_refused(done, error)


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
"""A program that imports the command once, and runs it in a forked child for each file."""


def run_checks(
    files: Sequence[tuple[Path, Mapping[str, str]]], home: Path
) -> list[subprocess.CompletedProcess[str]]:
    """Run `em-runner check` for each file with its environment variables."""
    done = subprocess.run(
        [sys.executable, "-c", CHECKS],
        input=repr([(str(file), dict(environ)) for file, environ in files]),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return [subprocess.CompletedProcess("check", *found) for found in ast.literal_eval(done.stdout)]


def run_check(file: Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", "check", "-c", str(file)]
    variables = {"PATH": os.environ["PATH"], "HOME": str(home)}
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=200, check=False
    )


def assert_refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 78, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("em-runner: ")
    for part in expected:
        assert part in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert SECRET not in done.stderr + done.stdout


def test_check_of_a_handler_that_cannot_be_imported_exits_with_78(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        AGENT.replace("worker.echo", "broken"),
        {"broken.py": "\n\nimport no_such_module_at_all\n"},
    )
    done = run_check(file, tmp_path)
    assert_refused(done, "agent 'echo'", "no_such_module_at_all", "broken.py, line 3")


def test_check_shows_the_source_of_nodes_not_set_by_the_agent(tmp_path: Path) -> None:
    file = write(tmp_path, AGENT)
    conf = tmp_path / "user" / ".config" / "emergence" / "emergence.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("[em_disco]\nnodes = localhost:9001\n")
    shown = {
        "ws://localhost:8080 (EM_DISCO_HOST)": {"EM_DISCO_HOST": "localhost"},
        "ws://localhost:9002 (EM_DISCO_PORT)": {"EM_DISCO_PORT": "9002"},
        f"ws://localhost:9001 ({conf})": {"HOME": str(tmp_path / "user")},
        "ws://localhost:8080 (": {},
    }
    found = run_checks([(file, environ) for environ in shown.values()], tmp_path)
    for done, node in zip(found, shown, strict=True):
        assert f" {node}" in done.stdout, done


def test_check_shows_no_source_of_a_node_set_by_the_agent(tmp_path: Path) -> None:
    file = write(tmp_path, AGENT + 'nodes = ["localhost:9000"]\n')
    (done,) = run_checks([(file, {})], tmp_path)
    assert "ws://localhost:9000 " in done.stdout
    assert "(" not in done.stdout


@pytest.mark.message_text
def test_check_names_the_default_node_as_such(tmp_path: Path) -> None:
    (done,) = run_checks([(write(tmp_path, AGENT), {})], tmp_path)
    assert " ws://localhost:8080 (the default) " in done.stdout


def test_folder_in_place_of_a_file_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{folder}: .*: Is a directory$"):
        load(folder)


@pytest.mark.message_text
def test_message_for_a_folder_has_the_reason(folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{folder}: cannot be read: Is a directory$"):
        load(folder)


def test_error_for_a_missing_file_names_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml"):
        load(folder / "gone.toml")


@pytest.mark.message_text
def test_message_for_a_missing_file_suggests_the_option(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file; name one with -c"):
        load(folder / "gone.toml")


def test_minimal_agent_has_the_defaults_of_the_reference(folder: Path) -> None:
    (echo,) = read(folder, AGENT).agents
    assert echo.name == "echo"
    assert str(echo.handler) == "worker.echo:handle"
    assert echo.memory == "ram"
    assert echo.concurrency == 1
    assert echo.capabilities is None, "the handler's capabilities apply"
    assert echo.nodes == (NodeAddress("localhost", 8080, False),)
    assert echo.token == TokenSource()


def test_connection_has_the_defaults_of_the_reference(folder: Path) -> None:
    connection = read(folder, AGENT).agents[0].connection
    assert connection.reconnect_interval_ms == 5000
    assert connection.connect_timeout_ms == 5000
    assert connection.upgrade_timeout_ms == 5000
    assert connection.ping_interval_ms == 20_000


def test_runner_and_supervision_have_default_values(folder: Path) -> None:
    config = read(folder, AGENT)
    assert str(config.http) == "127.0.0.1:9600"
    assert config.runner.http_token is None
    assert config.runner.query_timeout_ms == 30_000
    assert config.runner.max_in_flight == 1024
    assert config.supervision.max_restarts == 10
    assert config.supervision.restart_window_s == 60
    assert config.supervision.shutdown_timeout_ms == 5000


@pytest.mark.message_text
def test_origin_of_the_default_node_is_named_as_such(folder: Path) -> None:
    assert read(folder, AGENT).agents[0].nodes_origin == "the default"


def test_file_with_a_byte_order_mark_is_read(folder: Path) -> None:
    assert read(folder, b"\xef\xbb\xbf" + AGENT.encode()).agents[0].name == "echo"


def test_empty_list_of_capabilities_overrides_the_handlers(folder: Path) -> None:
    assert read(folder, agent("capabilities = []")).agents[0].capabilities == ()


def test_agent_overrides_the_connection_for_itself_only(folder: Path) -> None:
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
def test_reconnect_interval_comes_from_agent_file_or_environment(
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
def test_token_comes_from_agent_file_or_environment(
    of_agent: str | None,
    of_all: str | None,
    variable: str | None,
    expected: str | None,
    folder: Path,
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


def test_token_kind_of_an_agent_overrides_that_of_the_connection(folder: Path) -> None:
    text = with_agent("[connection]", 'jwt_token = "all"') + 'jwt_token_file = "own.jwt"\n'
    assert read(folder, text).agents[0].token.token_file == folder / "own.jwt"


def test_token_file_may_be_created_after_the_start(folder: Path) -> None:
    source = read(folder, agent('jwt_token_file = "later.jwt"')).agents[0].token
    with pytest.raises(TokenError, match=r"later\.jwt"):
        source.read("echo")
    (folder / "later.jwt").write_text("fresh\n")
    assert source.read("echo") == "fresh"


def test_relative_paths_start_at_the_configurations_folder(folder: Path) -> None:
    text = (
        '[runner]\nstate_dir = "state"\nhttp_token_file = "t/http"\n'
        f'[connection]\njwt_secret_file = "{folder}/elsewhere/secret"\ntls_ca_file = "ca.pem"\n'
        '[[agent]]\nname = "a"\nhandler = "own/a.py:handle"\n'
    )
    beside = {"t/http": "tok\n", "elsewhere/secret": "x" * 32, "ca.pem": "-", "own/a.py": ""}
    config = read(folder, text, **beside)
    (found,) = config.agents
    assert config.runner.state_dir == folder / "state"
    assert config.runner.http_token == Secret("tok")
    assert found.token.secret_file == folder / "elsewhere/secret"
    assert found.connection.tls_ca_file == folder / "ca.pem"
    assert (found.handler.file, found.handler.search_dir) == (folder / "own/a.py", folder / "own")


def test_relative_configuration_path_gives_absolute_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, with_agent("[runner]", 'state_dir = "state"'))
    monkeypatch.chdir(folder)
    config = load(Path("em-runner.toml"), environ={}, emergence_conf=folder / "none")
    assert config.runner.state_dir == folder / "state"
    assert config.agents[0].handler.search_dir == folder


def test_tilde_in_a_path_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    config = read(
        folder, with_agent("[runner]", 'state_dir = "~/state"') + 'jwt_token_file = "~/t.jwt"\n'
    )
    assert config.runner.state_dir == folder / "home/state"
    assert config.agents[0].token.token_file == folder / "home/t.jwt"
    assert read(folder, AGENT).runner.state_dir == folder / "home/.local/state/em-runner"


def test_address_open_to_other_machines_is_allowed_with_a_token(folder: Path) -> None:
    config = read(folder, with_agent("[runner]", 'http = "0.0.0.0:80"', f'http_token = "{SECRET}"'))
    assert not config.http.loopback
    assert config.runner.http_token == Secret(SECRET)
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
def test_http_address_is_read_and_classified_as_loopback_or_not(
    text: str, host: str, port: int, loopback: bool
) -> None:
    address = parse_http_address(text)
    assert (address.host, address.port) == (host, port)
    assert address.loopback is loopback
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["", ":80", "h:", "h:x", "h:-1", "h:65536", "h:080000", "::1:80", "[::1]", "a b:1", "h:1\n"],
)
def test_invalid_http_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_http_address(text)


@pytest.mark.message_text
def test_message_for_an_invalid_http_address_shows_the_form() -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        parse_http_address("h:x")


def refusal(function: Callable[..., object], *arguments: object) -> str:
    """Return the text of the ConfigError, or an empty text."""
    try:
        function(*arguments)
    except ConfigError as exc:
        return str(exc)
    return ""


@given(st.text())
def test_any_http_address_is_accepted_or_refused_in_one_line(text: str) -> None:
    assert refusal(parse_http_address, text).isprintable()


@given(st.text())
def test_any_handler_text_is_accepted_or_refused_in_one_line(text: str) -> None:
    assert "\n" not in refusal(parse_handler, text, Path("/nowhere"))


def test_folder_of_em_runners_packages_is_accepted() -> None:
    assert parse_handler("worker.echo:handle", ROOT).module == "worker.echo"


def test_folder_named_like_a_package_without_python_is_accepted(folder: Path) -> None:
    (folder / "shared").mkdir()
    assert read(folder, AGENT).agents[0].name == "echo"


def test_each_agent_and_node_has_a_worker_in_file_order(folder: Path) -> None:
    text = agent('nodes = ["localhost", "h:9"]') + AGENT.replace('"echo"', '"b"')
    text = '[runner]\nlog_level = "debug"\n[supervision]\nshutdown_timeout_ms = 7\n' + text
    specs = worker_specs(read(folder, text))
    assert [(spec.name, str(spec.node)) for spec in specs] == [
        ("echo_server", "ws://localhost:8080"),
        ("echo_server_2", "ws://h:9"),
        ("b_server", "ws://localhost:8080"),
    ]
    assert {spec.agent.supervision.shutdown_timeout_ms for spec in specs} == {7}
    assert {spec.runner.log_level for spec in specs} == {"debug"}


def test_token_of_the_runner_is_not_sent_to_a_worker(folder: Path) -> None:
    (folder / "token").write_text(SECRET)
    (folder / "token").chmod(0o600)
    config = read(folder, with_agent("[runner]", 'http_token_file = "token"'))
    assert SECRET.encode() in pickle.dumps(config.runner)
    assert SECRET.encode() not in pickle.dumps(worker_specs(config))


def test_workers_are_numbered_as_in_the_reference() -> None:
    assert [worker_name("a", index) for index in (1, 2, 3)] == [
        "a_server",
        "a_server_2",
        "a_server_3",
    ]
