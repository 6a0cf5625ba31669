"""Loads an agent's handler: a function, or a class or object with `handle`, sync or async."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import msgspec

from shared.errors import ConfigError
from shared.handlers import HandlerRef
from shared.logs import get_logger, shortened
from shared.schema import LogLevel

LONGEST_QUERY_CHARS: Final = 200
"""How much of a query's text is logged, at debug level; at no other any of it."""

_OWN_NAME: Final = "em_handler_"
_HERE: Final = Path(__file__).parent


class Handler(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded handler.

    `handle(body, memory)` returns `(result, new_memory)`, or a coroutine of it when `is_async`.
    `setup` and `close`, where the handler has them, are called without arguments before its first
    and after its last query; either may be a coroutine function.
    """

    handle: Callable[[str, dict[Any, Any]], Any]
    is_async: bool
    capabilities: tuple[str, ...] = ()
    setup: Callable[[], Any] | None = None
    close: Callable[[], Any] | None = None


def load(ref: HandlerRef, *, reuse: bool = False) -> Handler:
    """Import a handler and check that it can be called.

    Args:
        ref: where it is.
        reuse: take the module that somebody has made of its file already, where there is one.

    Raises:
        ConfigError: one line that says what failed and where; its cause is what the module raised.
    """
    try:
        return examined(_attribute(_import(ref, reuse), ref), ref)
    except ConfigError:
        raise
    except BaseException as exc:  # a module may raise anything, SystemExit too, while it is imported
        raise ConfigError(f"the handler {ref} cannot be imported: {_describe(exc)}{_hint(exc, ref)}") from exc


def examined(found: Any, ref: HandlerRef) -> Handler:
    """Check that an object can be called as a handler; a class is instantiated. `ref` is what errors call it.

    Raises:
        ConfigError: one line that says what is wrong with it.
    """
    target = found() if inspect.isclass(found) else found
    handle = getattr(target, "handle", target)
    if not callable(handle):
        raise ConfigError(
            f"the handler {ref} is a {type(target).__name__}; expected a function, or a class with handle()"
        )
    if inspect.isgeneratorfunction(handle) or inspect.isasyncgenfunction(handle):
        raise ConfigError(f"the handler {ref} has a 'yield' in it; it must return (result, memory)")
    _check_arguments(handle, ref)
    return Handler(
        handle=handle,
        is_async=_is_async(handle),
        capabilities=_capabilities(target, ref),
        setup=_method(target, "setup"),
        close=_method(target, "close"),
    )


def told(handler: Handler, level: LogLevel) -> Handler:
    """Have each query's text in the log, cut, where that is at debug level; else return the handler as it is."""
    if level != "debug":
        return handler
    handle, log = handler.handle, get_logger("worker.query")

    def handle_and_tell(body: str, memory: dict[Any, Any]) -> Any:
        log.debug("query", text=shortened(body, LONGEST_QUERY_CHARS))
        return handle(body, memory)

    return msgspec.structs.replace(handler, handle=handle_and_tell)


def _import(ref: HandlerRef, reuse: bool) -> ModuleType:
    folder = str(ref.search_dir)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if ref.file is None:
        assert ref.module is not None
        try:
            module = importlib.import_module(ref.module)
        except ImportError:
            _check_whose(ref)
            raise
        _check_whose(ref)
        return module
    made = _made_of(ref.file) if reuse else None
    return made or _import_file(ref.file)


def _check_whose(ref: HandlerRef) -> None:
    """Refuse a module that was had from elsewhere, though one of its name lies where the handler is looked for.

    What Python has imported already, and what is built into it, hides any file.

    Raises:
        ConfigError: naming both.
    """
    assert ref.module is not None
    name = ref.module.partition(".")[0]
    there = [file for file in (ref.search_dir / name / "__init__.py", ref.search_dir / f"{name}.py") if file.is_file()]
    had = sys.modules.get(name)
    if not there or had is None:
        return
    found = file_of(had)
    if found is None and name not in sys.builtin_module_names:
        return  # what a file has put in its own place
    if found not in [file.resolve() for file in there]:
        raise ConfigError(
            f"the handler {ref} is not that of {there[0]}: the name {name!r} is taken by "
            f"{found or 'a module of Python itself'}; rename the file, or name it by its path, file.py:{ref.attribute}"
        )


def _made_of(file: Path) -> ModuleType | None:
    """Return the module that an import of somebody else's made of a file."""
    file = file.resolve()
    for name, module in list(sys.modules.items()):
        if not name.startswith(_OWN_NAME) and file_of(module) == file:
            return module
    return None


def file_of(module: ModuleType) -> Path | None:
    """Return the file that a module was made of, wherever links lead; a folder, where that is all there is of it."""
    named = getattr(module, "__dict__", {})  # not its attributes: some import more when they are asked for
    if isinstance(file := named.get("__file__"), str):
        return Path(file).resolve()
    with contextlib.suppress(Exception):  # the places of a folder without __init__.py are found out when they are read
        for place in named.get("__path__", ()):
            return Path(place).resolve()
    return None


def _import_file(file: Path) -> ModuleType:
    # A name of its own, so that my/json.py does not become everybody's json; registered, because
    # dataclasses, pickle and annotations look their module up by name.
    name = f"{_OWN_NAME}{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the handler {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, ref: HandlerRef) -> Any:
    found: Any = module
    for part in ref.attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"the handler {ref} does not exist: it has no {part!r}{_instead(found, part)}")
        found = getattr(found, part)
    return found


def _instead(found: Any, name: str) -> str:
    """Return what may have been meant: what is named alike, else what a module or class defines."""
    there = {
        each: value for each, value in getattr(found, "__dict__", {}).items() if each[:1] != "_" and callable(value)
    }
    if close := difflib.get_close_matches(name, there, n=1):
        return f"; did you mean {close[0]!r}?"
    module = getattr(found, "__module__", None) or getattr(found, "__name__", None)
    own = sorted(each for each, value in there.items() if getattr(value, "__module__", None) == module)
    return f"; it has {', '.join(own[:8])}" if own else ""


def _check_arguments(handle: Callable[..., Any], ref: HandlerRef) -> None:
    try:
        signature = inspect.signature(handle)
    except (TypeError, ValueError):
        return  # some callables of C extensions have no signature; they are called as they are
    try:
        signature.bind("", {})
    except TypeError as exc:
        raise ConfigError(f"the handler {ref} must take (body, memory): {exc}") from None


def _is_async(handle: Callable[..., Any]) -> bool:
    # The method itself is looked at, not whether it exists; either side of a decorator may be the async one.
    while isinstance(handle, functools.partial):
        handle = handle.func
    seen = (handle, inspect.unwrap(handle), getattr(handle, "__call__", None))  # noqa: B004
    return any(inspect.iscoroutinefunction(one) for one in seen)


def _capabilities(target: Any, ref: HandlerRef) -> tuple[str, ...]:
    method = _method(target, "capabilities")
    if method is None:
        return ()
    try:
        return tuple(msgspec.convert(method(), list[str]))
    except msgspec.ValidationError:
        raise ConfigError(f"the handler {ref}: capabilities() must return a list of strings") from None
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - a user's code
        raise ConfigError(f"the handler {ref}: capabilities() failed: {_describe(exc)}") from None


def _method(target: Any, name: str) -> Callable[[], Any] | None:
    # A plain function has no life-cycle; an attribute of that name on it would be an accident.
    found = None if inspect.isroutine(target) else getattr(target, name, None)
    return found if callable(found) else None


def _describe(exc: BaseException) -> str:
    """Return an exception and the last place of the user's code that it came through, on one line."""
    if isinstance(exc, SyntaxError) and exc.filename:  # whose own text has the file's name without its folder
        return " ".join(f"{type(exc).__name__}: {exc.msg} ({exc.filename}, line {exc.lineno})".split())
    text = " ".join(f"{type(exc).__name__}: {exc}".split())
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if not _is_ours(f.filename)]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


def _hint(exc: BaseException, ref: HandlerRef) -> str:
    if ref.file is None or not isinstance(exc, ImportError) or "relative import" not in str(exc):
        return ""
    return f"; a file by itself is in no package: name it as a module, package.{ref.file.stem}:{ref.attribute}"


def frames_of(exc: BaseException) -> str:
    """Return an exception's traceback, and those of what it came of, without the lines of em-runner's own."""
    told = traceback.TracebackException.from_exception(exc)
    _leave_out_ours(told)
    return "".join(told.format()).rstrip()


def _leave_out_ours(told: traceback.TracebackException) -> None:
    told.stack = traceback.StackSummary.from_list([frame for frame in told.stack if not _is_ours(frame.filename)])
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if other is not None:
            _leave_out_ours(other)


def _is_ours(filename: str) -> bool:
    return filename.startswith("<frozen") or filename == importlib.__file__ or Path(filename).parent == _HERE
