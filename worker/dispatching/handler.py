"""Loads an agent's handler: a function, or a class or object with `handle`, sync or async."""

from __future__ import annotations

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

from shared.config.handlers import HandlerRef
from shared.errors import ConfigError, kind_of, text_of, with_hint
from shared.logs.logger import LogLevel, get_logger, shortened

LONGEST_QUERY_CHARS: Final = 200
"""How much of a query's text is logged at debug level. At other levels none of it is logged."""

_HERE: Final = Path(__file__).parent


class Handler(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded handler.

    `handle(body, memory)` returns `(result, new_memory)`, or a coroutine of it if `is_async`.
    `setup` and `close`, if any, are called without arguments before the first and after the last
    query. Either may be a coroutine function.
    """

    handle: Callable[[str, dict[Any, Any]], Any]
    is_async: bool
    capabilities: tuple[str, ...] = ()
    setup: Callable[[], Any] | None = None
    close: Callable[[], Any] | None = None

    @classmethod
    def from_object(cls, found: Any, ref: HandlerRef) -> Handler:
        """Return a handler for an object. A class is instantiated. `ref` is its name in errors.

        Raises:
            ConfigError: if it cannot be called as a handler. The text is one line.
        """
        target = found() if inspect.isclass(found) else found
        handle = getattr(target, "handle", target)
        if not callable(handle):
            raise ConfigError(
                f"the handler {ref} is {kind_of(target)}; "
                "expected a function, or a class with handle()"
            )
        if inspect.isgeneratorfunction(handle) or inspect.isasyncgenfunction(handle):
            raise ConfigError(f"the handler {ref} has a 'yield'; it must return (result, memory)")
        _check_arguments(handle, ref)
        return cls(
            handle=handle,
            is_async=_is_async(handle),
            capabilities=_capabilities(target, ref),
            setup=_method(target, "setup"),
            close=_method(target, "close"),
        )

    def with_query_logging(self, level: LogLevel) -> Handler:
        """Return a handler that logs each query's text, shortened, at debug level."""
        # At other levels it costs a query nothing, not even a call.
        if level != "debug":
            return self
        log = get_logger()

        def handle_and_log(body: str, memory: dict[Any, Any]) -> Any:
            log.debug("query", text=shortened(body, LONGEST_QUERY_CHARS))
            return self.handle(body, memory)

        return msgspec.structs.replace(self, handle=handle_and_log)


def load(ref: HandlerRef) -> Handler:
    """Import a handler and check that it can be called.

    Raises:
        ConfigError: one line that says what failed and where. Its cause is what the module raised.
    """
    try:
        return Handler.from_object(_attribute(_import(ref), ref), ref)
    except ConfigError:
        raise
    except BaseException as exc:  # noqa: BLE001 - an import may raise anything, SystemExit, too
        text = f"the handler {ref} cannot be imported: {_describe(exc)}"
        raise ConfigError(with_hint(text, _hint(exc, ref))) from without_internal_frames(exc)


def without_internal_frames(exc: BaseException) -> BaseException:
    """Cut the frames of em-runner and of Python's importer off the start of a traceback."""
    # The author of a handler looks for a line of the handler, and these come before it.
    trace = exc.__traceback__
    while trace is not None and _is_internal(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return exc.with_traceback(trace)


def _import(ref: HandlerRef) -> ModuleType:
    # First, so that a module beside the configuration is found before an installed one.
    folder = str(ref.search_dir)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if ref.file is not None:
        return _import_file(ref.file)
    assert ref.module is not None
    return importlib.import_module(ref.module)


def _import_file(file: Path) -> ModuleType:
    # The prefix keeps my/json.py from becoming the `json` of all other modules. The module is
    # registered, because dataclasses, pickle and annotations look up their module by its name.
    name = f"em_handler_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the handler {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, ref: HandlerRef) -> Any:
    found: Any = module
    for name in ref.attribute.split("."):
        if not hasattr(found, name):
            text = f"the handler {ref} does not exist: it has no {name!r}"
            raise ConfigError(with_hint(text, _alternatives(found, name)))
        found = getattr(found, name)
    return found


def _alternatives(found: Any, missing: str) -> str | None:
    """Return a hint at a similar name, or at what the module or class defines, if anything."""
    functions = {
        name: value
        for name, value in getattr(found, "__dict__", {}).items()
        if not name.startswith("_") and callable(value)
    }
    if close := difflib.get_close_matches(missing, functions, n=1):
        return f"did you mean {close[0]!r}?"
    # Names that a module only imports are not suggested.
    module = getattr(found, "__module__", None) or getattr(found, "__name__", None)
    own = sorted(
        name for name, value in functions.items() if getattr(value, "__module__", None) == module
    )
    return f"it has {', '.join(own[:8])}" if own else None


def _check_arguments(handle: Callable[..., Any], ref: HandlerRef) -> None:
    try:
        inspect.signature(handle).bind("", {})
    except ValueError:
        return  # some callables of C extensions have no signature, and may still be right
    except TypeError as exc:
        raise ConfigError(f"the handler {ref} must take (body, memory): {exc}") from None


def _is_async(handle: Callable[..., Any]) -> bool:
    while isinstance(handle, functools.partial):
        handle = handle.func
    # Either side of a decorator may be async: the wrapper, or the function that it wraps. An
    # object may be async by its `__call__`. `iscoroutinefunction` does not look at that method.
    forms = (handle, inspect.unwrap(handle), getattr(handle, "__call__", None))  # noqa: B004
    return any(inspect.iscoroutinefunction(form) for form in forms)


def _capabilities(target: Any, ref: HandlerRef) -> tuple[str, ...]:
    method = _method(target, "capabilities")
    if method is None:
        return ()
    try:
        return tuple(msgspec.convert(method(), list[str]))
    except msgspec.ValidationError:
        problem = "must return a list of strings"
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - a user's code may raise anything
        problem = f"failed: {_describe(exc)}"
    raise ConfigError(f"the handler {ref}: capabilities() {problem}")


def _method(target: Any, name: str) -> Callable[[], Any] | None:
    # A plain function has no life cycle. An attribute of that name on it would be an accident.
    found = None if inspect.isroutine(target) else getattr(target, name, None)
    return found if callable(found) else None


def _describe(exc: BaseException) -> str:
    """Return an exception and the last place outside em-runner that it passed, on one line."""
    text = type(exc).__name__
    if isinstance(exc, SyntaxError) and exc.filename:
        # Its own text names the file without the folder.
        text += f": {exc.msg} ({exc.filename}, line {exc.lineno})"
    else:
        text += f": {text_of(exc)}"
        frames = traceback.extract_tb(exc.__traceback__)
        places = [frame for frame in frames if not _is_internal(frame.filename)]
        if places:
            text += f" ({places[-1].filename}, line {places[-1].lineno})"
    return " ".join(text.split())


def _hint(exc: BaseException, ref: HandlerRef) -> str | None:
    is_relative = isinstance(exc, ImportError) and "relative import" in text_of(exc)
    if ref.file is None or not is_relative:
        return None
    name = f"package.{ref.file.stem}:{ref.attribute}"
    return f"relative imports need a package: name the handler as a module, {name}"


def _is_internal(filename: str) -> bool:
    return (
        filename.startswith("<frozen")
        or filename == importlib.__file__
        or Path(filename).parent == _HERE
    )
