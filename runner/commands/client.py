"""The client of a running runner: HTTP, and its reload socket."""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import msgspec

from runner import version
from runner.state_dir import ReloadOutcome, RunnerAddress, StateDir, read_address
from shared.config.schema import DEFAULT_HTTP
from shared.errors import CommandError, with_hint
from shared.http.errors import ErrorBody, ErrorCode
from shared.logs.logger import printable_line

_Body = TypeVar("_Body")

EXAMPLE_URL: Final = f"http://{DEFAULT_HTTP}"

_UP_HINT: Final = "is the runner up?"
_TLS_HINT: Final = (
    "the runner itself does not speak TLS, its address starts with http://; for a proxy with TLS, "
    "SSL_CERT_FILE can name a file with the certificate of its issuer"
)
_HINTS: Final = {
    ErrorCode.AGENT_REQUIRED: "use --agent NAME",
    ErrorCode.UNAUTHORIZED: "name the file with the token as --token-file",
    ErrorCode.HANDLER_FAILED: "the traceback is in the runner's log",
    ErrorCode.WORKER_UNAVAILABLE: "em-runner status shows the reason",
    ErrorCode.WORKER_BUSY: "try again, or query another worker",
    ErrorCode.TOO_MANY_CONNECTIONS: "try again",
    ErrorCode.TIMED_OUT: "see query_timeout_ms and handler_timeout_ms",
}

_EXIT_STATUSES: Final = {
    200: 0,
    400: 2,
    404: 2,
    413: 2,
    500: 3,
    503: 4,
}


class Response(NamedTuple):
    """A response: its status, its decoded body, and the worker that had the query, if any."""

    status: int
    body: Any
    worker: str | None


def parse_url(text: str) -> str:
    """Return the address of a runner, from a URL or from HOST:PORT.

    Raises:
        ValueError: if it is neither, or contains a password; its text says what is expected.
    """
    # The message repeats no part of `text`, because no parser knows where the password ends.
    if "@" in text:
        raise ValueError(
            "an address with a name or a password in it is not accepted; write the runner's token "
            "into a file, and name that as --token-file"
        )
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        # `port` raises ValueError if it is not a port.
        has_port = parts.port is not None
    except ValueError:
        valid = False
    else:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        valid = valid and not (parts.query or parts.fragment)
        # Without a scheme, "nonsense" would be a host.
        valid = valid and (has_port or url == text)
    if not valid:
        raise ValueError(f"found {text!r}, expected the runner's address, such as {EXAMPLE_URL}")
    return url.rstrip("/")


def find(url: str | None, state_dir: Path) -> str:
    """Return the runner's address: `url` if given, else the one in the state folder.

    Raises:
        CommandError: if the state folder has none, or this user may not read it.
    """
    if url is not None:
        return url
    return _running_address(state_dir).http


def _running_address(state_dir: Path) -> RunnerAddress:
    address = read_address(state_dir)
    if address is None:
        raise CommandError(
            f"no runner is known in {state_dir}; start one with 'em-runner run', or name its "
            "folder with --state-dir"
        )
    return address


def call(
    base: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    token: str | None = None,
    timeout_s: float,
    timeout_hint: str = _UP_HINT,
) -> Response:
    """Send one request: POST with `body` as JSON, or GET without a body.

    Raises:
        CommandError: if the runner does not answer, or another server does. After a timeout its
            text ends with `timeout_hint`.
        UnicodeEncodeError: if `body` contains text that UTF-8 cannot encode.
    """
    request = _request(base + path, body, token)
    try:
        try:
            with _open(request, timeout=timeout_s) as response:
                return _read_response(base, path, response)
        except urllib.error.HTTPError as error_response:
            with error_response:
                return _read_response(base, path, error_response)
    # The runner sends a handler's JSON unchanged, also if it is nested too deeply to be decoded.
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as exc:
        # urllib wraps the error of a connection that cannot be made, but not that of one that is
        # lost later.
        reason = getattr(exc, "reason", None) or exc
        if isinstance(reason, TimeoutError):
            problem = f" within {timeout_s:g} s; {timeout_hint}"
        else:
            hint = _TLS_HINT if isinstance(reason, ssl.SSLError) else _UP_HINT
            problem = f": {printable_line(reason)}; {hint}"
        raise CommandError(f"no answer from {base}{problem}") from None


def _request(
    url: str,
    body: dict[str, Any] | None,
    token: str | None,
) -> urllib.request.Request:
    if token is not None and not (token.isascii() and token.isprintable()):
        raise CommandError(
            "the token has a character that no HTTP header can have; is its file one line of text?"
        )
    data = None if body is None else msgspec.json.encode(body)
    request = urllib.request.Request(url, data=data)
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    return request


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect."""

    def redirect_request(self, *_: Any) -> None:
        """Return nothing, so that the redirect itself is the response."""


# No proxy of the environment and no redirect's target may get the token. The address of a runner
# is normally on this machine, where a proxy makes no sense either.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects).open


def _read_response(
    base: str,
    path: str,
    response: http.client.HTTPResponse | urllib.error.HTTPError,
) -> Response:
    status = int(response.status or 0)
    if 300 <= status < 400:
        location = response.headers.get("location", "")
        target = urljoin(base + path, location).removesuffix(path)
        raise CommandError(
            f"{base} redirects with {status} to {printable_line(target)}, which is not followed; "
            "if the runner is there, name that address with --url"
        )
    try:
        body = msgspec.json.decode(response.read())
        return Response(status, body, response.headers.get("x-worker"))
    except msgspec.DecodeError:
        # em-runner answers the paths of this client with JSON, so this response is from another
        # server, perhaps a proxy in front of it.
        if status >= 500:
            raise CommandError(f"{status} from {base}; is the runner behind it up?") from None
        raise _not_a_runner(base) from None


def _not_a_runner(base: str) -> CommandError:
    """Return the error for an address at which another server is listening."""
    return CommandError(
        f"the server at {base} does not answer as em-runner {version()} does; if it is an older "
        "em-runner, restart it, else name the runner's address with --url"
    )


def reload(state_dir: Path, timeout_s: float = 120.0) -> ReloadOutcome:
    """Make the runner of a state folder reload, and return the outcome.

    Raises:
        CommandError: if no runner is running, it exits, or the reload takes longer than
            `timeout_s`.
    """
    address = _running_address(state_dir)
    runner = f"the runner (pid {address.pid})"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            # The connection itself is the request: nothing is sent.
            connection.connect(str(StateDir(state_dir).reload_path))
            with connection.makefile("rb") as reply:
                return msgspec.json.decode(reply.read(), type=ReloadOutcome)
    except TimeoutError:
        raise CommandError(f"{runner} did not finish the reload within {timeout_s:.0f} s") from None
    except (ConnectionResetError, msgspec.DecodeError):
        # The connection ended without an outcome, or in the middle of it.
        raise CommandError(f"{runner} exited before the reload was done; see its log") from None
    except OSError as exc:
        raise CommandError(f"{runner} cannot be reached: {exc.strerror or exc}") from None


def convert(base: str, response: Response, body: type[_Body]) -> _Body:
    """Return the body of a response as a Struct.

    Raises:
        CommandError: if another server sent it, or a runner of another version.
    """
    try:
        return msgspec.convert(response.body, body)
    except msgspec.ValidationError:
        raise _not_a_runner(base) from None


def exit_status(http_status: int) -> int:
    """Return the exit status of `em-runner query` for an HTTP status."""
    return _EXIT_STATUSES.get(http_status, 1)


def describe_failure(base: str, response: Response) -> str:
    """Return the message for the user about an error response, with a hint.

    Raises:
        CommandError: if another server sent it.
    """
    error = convert(base, response, ErrorBody)
    worker = f" ({response.worker})" if response.worker else ""
    # The other errors' texts contain their hint already.
    hint = _HINTS.get(error.code)
    return with_hint(f"{response.status}: {error.error}{worker}", hint)
