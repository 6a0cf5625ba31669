"""What the commands say to a running runner, over its HTTP."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urljoin, urlsplit

import msgspec

from runner.state_dir import Reloaded, read_address, read_reload
from shared.errors import StartError
from shared.logs import printable_line

_POLL_S: Final = 0.02


class Answer(NamedTuple):
    """A status, the decoded body, and the worker that answered, if one did."""

    status: int
    body: Any
    worker: str | None


class NotText(ValueError):
    """What cannot be sent, because it is no text."""


def parse_url(text: str) -> str:
    """Return the address of a runner, from a URL or from HOST:PORT.

    Raises:
        ValueError: when it is neither, or holds a password; the text says what is expected.
    """
    whole = text if "://" in text else f"http://{text}"
    if "@" in text:  # it is not repeated, not even in part
        raise ValueError(
            "an address with a name or a password in it is not taken; write the runner's token into a file, and name "
            "that as --token-file"
        )
    try:
        parts = urlsplit(whole)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        good = good and (parts.port is not None or "://" in text)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"found {text!r}, expected the runner's address, such as http://127.0.0.1:9600")
    return whole.rstrip("/")


def find(url: str | None, state_dir: Path) -> str:
    """Return the runner's address: the one given (see `parse_url`), else the one that the state folder names.

    Raises:
        StartError: when there is none, or none that this user may know of.
    """
    if url is not None:
        return url
    address = read_address(state_dir)
    if address is None:
        raise StartError(
            f"no runner is known in {state_dir}; start one with 'em-runner run', or name its folder with --state-dir "
            "or its address with --url"
        )
    return address.http


def call(
    base: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    token: str | None = None,
    timeout_s: float = 35.0,
    late: str = "is the runner up?",
) -> Answer:
    """Make one request: POST of `body` as JSON, GET without one. `late` says what to do where no answer comes in time.

    Raises:
        StartError: when the runner does not answer, or what answers is none.
        NotText: when `body` cannot be sent.
    """
    if token is not None and not (token.isascii() and token.isprintable()):
        raise StartError("the token holds characters that no HTTP header can; is its file one line of text?")
    try:
        data = None if body is None else msgspec.json.encode(body)
    except UnicodeEncodeError:
        raise NotText("the query is no text in UTF-8") from None
    try:
        request = urllib.request.Request(base + path, data=data)
        request.add_header("Content-Type", "application/json")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with _open(request, timeout=timeout_s) as response:
                return _answer(base, path, response)
        except urllib.error.HTTPError as refused:
            with refused:
                return _answer(base, path, refused)
    except (OSError, ValueError, http.client.HTTPException) as exc:
        reason = getattr(exc, "reason", None) or exc
        words, advice = printable_line(reason), "is the runner up?"
        if isinstance(reason, TimeoutError):
            words, advice = f"none within {timeout_s:g} s", late
        elif isinstance(reason, ssl.SSLCertVerificationError):
            words = printable_line(reason.verify_message)
            advice = "its certificate is not trusted here; SSL_CERT_FILE may name one that vouches for it"
        elif isinstance(reason, ssl.SSLError):
            advice = "does it speak TLS? The runner itself does not: its address begins with http://"
        raise StartError(f"no answer from {base}: {words}; {advice}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Goes nowhere: whoever a redirect names would get the token."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none; the answer itself is handed back."""


# A runner is asked directly: a proxy of the environment would get its token.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects).open


def _answer(base: str, path: str, response: http.client.HTTPResponse | urllib.error.HTTPError) -> Answer:
    status = int(response.status or 0)
    if 300 <= status < 400:
        to = urljoin(base + path, response.headers.get("location", "")).removesuffix(path)
        raise StartError(
            f"{base} answers {status} to {printable_line(to)}, which is not followed; if the runner is there, name "
            "that address with --url"
        )
    try:
        return Answer(status, msgspec.json.decode(response.read()), response.headers.get("x-worker"))
    except msgspec.DecodeError:
        if status >= 500:  # no runner says so in other words than JSON
            raise StartError(f"{status} from {base}; is the runner behind it up?") from None
        raise not_a_runner(base) from None
    except RecursionError:
        raise StartError(f"the answer of {base} is nested too deeply to be read here; ask with curl") from None


def not_a_runner(base: str) -> StartError:
    """Return the error that says so of what answers at an address."""
    return StartError(f"what answers at {base} is not em-runner; name the runner's address with --url")


def reload(state_dir: Path, timeout_s: float = 120.0) -> Reloaded:
    """Have the runner of a state folder reload, and return how that went.

    Raises:
        StartError: when there is no runner, or it does not say how it went in time.
    """
    address = read_address(state_dir)
    if address is None:
        raise StartError(f"no runner is known in {state_dir}; name its state folder with --state-dir")
    asked_s = time.monotonic()
    try:
        os.kill(address.pid, signal.SIGHUP)
    except OSError as exc:
        raise StartError(f"the runner (pid {address.pid}) cannot be told: {exc.strerror}") from None
    while time.monotonic() < asked_s + timeout_s:
        outcome = read_reload(state_dir, asked_s)
        if outcome is not None:
            return outcome
        if read_address(state_dir) != address:
            raise StartError(f"the runner (pid {address.pid}) has ended meanwhile; its log says why")
        time.sleep(_POLL_S)
    raise StartError(f"the runner (pid {address.pid}) has not said within {timeout_s:.0f} s how the reload went")


def is_refusal(answer: Answer) -> bool:
    """Whether an answer that is none is em-runner's: it has words for it, and a 404 names whom it does not know."""
    error = answer.body.get("error") if isinstance(answer.body, dict) else None
    unknown = ("there is no agent ", "there is no worker ", "the worker ")
    return isinstance(error, str) and (answer.status != 404 or error.startswith(unknown))


def exit_status(http_status: int) -> int:
    """Return what `em-runner query` leaves with after an answer of that HTTP status."""
    return {200: 0, 400: 2, 404: 2, 413: 2, 500: 3, 503: 4}.get(http_status, 1)


def advice(answer: Answer) -> str:
    """Return what a person who asked may do about an answer that is none; empty where its own words say so."""
    words = str(answer.body)
    if answer.status == 401:
        return "; name the file with the token as --token-file"
    if answer.status == 400 and "as 'agent'" in words:
        return "; that is --agent NAME"
    if answer.status == 500:
        return "; the traceback is in the runner's log"
    if answer.status == 503:
        return "; ask again, or another" if "too many" in words else "; em-runner status says why"
    if answer.status == 504:
        return "; see query_timeout_ms and handler_timeout_ms"
    return ""
