"""`worker.dispatching.handler`: handlers of all supported forms, and the errors for others."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from shared.config.handlers import parse_handler
from shared.errors import ConfigError
from worker.dispatching.handler import Handler, load

_numbers = count()
Write = Callable[[str], Path]


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Write]:
    """Write modules with unique names, and remove them from `sys.modules` afterwards."""
    path, modules = list(sys.path), set(sys.modules)

    def write(source: str) -> Path:
        file = tmp_path / f"agent_{next(_numbers)}.py"
        file.write_text(textwrap.dedent(source))
        return file

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def load_by_module(file: Path, attribute: str) -> Handler:
    return load(parse_handler(f"{file.stem}:{attribute}", file.parent))


def load_by_file(file: Path, attribute: str) -> Handler:
    return load(parse_handler(f"{file.name}:{attribute}", file.parent))


def answer(handler: Handler) -> Any:
    """Return the handler's answer to the query `q`."""
    returned = handler.handle("q", {})
    return asyncio.run(returned) if handler.is_async else returned


FORMS = """
    import functools

    def plain(body, memory):
        return body, memory

    async def later(body, memory):
        return body, memory

    def three(prefix, body, memory):
        return prefix + body, memory

    async def three_later(prefix, body, memory):
        return prefix + body, memory

    partial = functools.partial(three, "p")
    partial_later = functools.partial(three_later, "p")

    def wrapped(function):
        @functools.wraps(function)
        def call(*args):
            return function(*args)
        return call

    def made_async(function):
        @functools.wraps(function)
        async def call(*args):
            return function(*args)
        return call

    decorated = wrapped(plain)
    decorated_later = wrapped(later)
    decorated_into_async = made_async(plain)

    class Plain:
        def handle(self, body, memory):
            return body, memory

    class Later:
        async def handle(self, body, memory):
            return body, memory

    class Call:
        def __call__(self, body, memory):
            return body, memory

    class CallLater:
        async def __call__(self, body, memory):
            return body, memory

    class Static:
        @staticmethod
        def handle(body, memory):
            return body, memory

        class Inner:
            def handle(self, body, memory):
                return body, memory

    class Shared:
        value = 0

        @classmethod
        def handle(cls, body, memory):
            return body, memory

    instance = Plain()
    call = Call()
    call_later = CallLater()
    method = instance.handle
    partial_call_later = functools.partial(functools.partial(CallLater()))
    lambda_ = lambda body, memory, extra=1, *rest, **more: (body, memory)
"""


@pytest.mark.parametrize("load_by", [load_by_module, load_by_file])
@pytest.mark.parametrize(
    ("attribute", "is_async", "result"),
    [
        ("plain", False, "q"),
        ("later", True, "q"),
        ("partial", False, "pq"),
        ("partial_later", True, "pq"),
        ("partial_call_later", True, "q"),
        ("decorated", False, "q"),
        ("decorated_later", True, "q"),
        ("decorated_into_async", True, "q"),
        ("Plain", False, "q"),
        ("Later", True, "q"),
        ("Call", False, "q"),
        ("CallLater", True, "q"),
        ("Static", False, "q"),
        ("Static.Inner", False, "q"),
        ("Static.handle", False, "q"),
        ("Shared", False, "q"),
        ("instance", False, "q"),
        ("call", False, "q"),
        ("call_later", True, "q"),
        ("method", False, "q"),
        ("lambda_", False, "q"),
    ],
)
def test_handler_of_each_form_is_loaded_and_called(
    load_by: Any, attribute: str, is_async: bool, result: str, module: Write
) -> None:
    handler = load_by(module(FORMS), attribute)
    assert handler.is_async is is_async
    assert answer(handler) == (result, {})
    assert (handler.capabilities, handler.setup, handler.close) == ((), None, None)


def test_object_may_define_capabilities_setup_and_close(module: Write) -> None:
    file = module(
        """
        class Agent:
            def __init__(self): self.calls = []
            def setup(self): self.calls.append("setup")
            def handle(self, body, memory): return self.calls, memory
            def close(self): self.calls.append("close")
            def capabilities(self): return ["search", "echo"]
        """
    )
    handler = load_by_module(file, "Agent")
    assert handler.capabilities == ("search", "echo")
    assert handler.setup is not None
    assert handler.close is not None
    handler.setup()
    handler.close()
    assert answer(handler) == (["setup", "close"], {})


def test_attributes_of_a_function_are_not_used_as_setup_or_capabilities(module: Write) -> None:
    file = module(
        "def handle(body, memory): return body, memory\n"
        "handle.setup = handle.capabilities = print\n"
    )
    handler = load_by_module(file, "handle")
    assert (handler.setup, handler.capabilities) == (None, ())


@pytest.mark.parametrize("load_by", [load_by_module, load_by_file])
def test_handler_imports_a_module_in_its_own_folder(load_by: Any, module: Write) -> None:
    sibling = module("VALUE = 'from the sibling'\n")
    file = module(
        f"def handle(body, memory):\n    import {sibling.stem}\n"
        f"    return {sibling.stem}.VALUE, memory\n"
    )
    assert answer(load_by(file, "handle")) == ("from the sibling", {})


def test_handler_file_named_like_a_module_does_not_replace_it(
    tmp_path: Path, module: Write
) -> None:
    (tmp_path / "json.py").write_text("def handle(body, memory): return body, memory\n")
    import json

    assert answer(load(parse_handler("json.py:handle", tmp_path))) == ("q", {})
    assert sys.modules["json"] is json


def test_relative_import_in_a_handler_file_is_refused(module: Write) -> None:
    with pytest.raises(ConfigError):
        load_by_file(module("from .helper import word\n"), "handle")


@pytest.mark.message_text
def test_message_for_a_relative_import_suggests_the_module_form(module: Write) -> None:
    file = module("from .helper import word\n")
    message = rf"relative import.*name the handler as a module, package\.{file.stem}:handle$"
    with pytest.raises(ConfigError, match=message):
        load_by_file(file, "handle")


def test_handler_file_may_define_dataclasses_and_pickle_them(module: Write) -> None:
    file = module(
        """
        from __future__ import annotations
        import dataclasses, pickle

        @dataclasses.dataclass
        class Found:
            title: str

        def handle(body, memory):
            return pickle.loads(pickle.dumps(Found(body))).title, memory
        """
    )
    assert answer(load_by_file(file, "handle")) == ("q", {})


def test_module_beside_the_configuration_precedes_the_python_path(
    tmp_path: Path, module: Write
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    for place in ("first", "second"):
        (tmp_path / place / "twice_there.py").write_text(
            f"def handle(body, memory): return {place!r}, memory\n"
        )
    sys.path.append(str(tmp_path / "second"))
    assert answer(load(parse_handler("twice_there:handle", tmp_path / "first"))) == ("first", {})


UNUSABLE: list[tuple[str, str, tuple[str, ...]]] = [
    (
        FORMS,
        "handle",
        ("does not exist", "has no 'handle'", "it has Call, CallLater, Later, Plain"),
    ),
    ("_x = 1", "handle", ("does not exist", "has no 'handle'")),
    (FORMS, "Static.Gone", ("has no 'Gone'",)),
    ("handle = 5", "handle", ("is an int; expected a function, or a class with handle()",)),
    ("class A: pass", "A", ("is an A; expected a function, or a class with handle()",)),
    ("class A: handle = 5", "A", ("expected a function, or a class with handle()",)),
    (
        "def handle(body): pass",
        "handle",
        ("must take (body, memory): too many positional arguments",),
    ),
    (
        "def handle(a, b, c): pass",
        "handle",
        ("must take (body, memory): missing a required argument: 'c'",),
    ),
    ("def handle(*, body, memory): pass", "handle", ("must take (body, memory)",)),
    ("class A:\n def handle(body, memory): pass", "A", ("must take (body, memory)",)),
    (
        "\n\nimport no_such_thing",
        "handle",
        ("ModuleNotFoundError: No module named 'no_such_thing'", "line 3)"),
    ),
    ("x = 1\ny = x / 0\n", "handle", ("ZeroDivisionError: division by zero", "line 2)")),
    ("def f():\n  raise ValueError('a\\nb')\nf()\n", "handle", ("ValueError: a b", "line 2)")),
    ("def handle(body, memory)\n", "handle", ("SyntaxError: expected ':'", "line 1)")),
    ("import sys\nsys.exit(3)\n", "handle", ("SystemExit: 3", "line 2)")),
    ("raise KeyboardInterrupt\n", "handle", ("KeyboardInterrupt", "line 1)")),
    (
        "class A:\n def __init__(self): raise OSError('no db')\n",
        "A",
        ("OSError: no db", "line 2)"),
    ),
    (
        "class A:\n def __init__(self, url): pass\n",
        "A",
        ("TypeError", "missing 1 required positional argument"),
    ),
]
"""Source, attribute, and the parts of the message."""


@pytest.mark.parametrize(
    ("source", "attribute"), [(source, attribute) for source, attribute, _ in UNUSABLE]
)
@pytest.mark.parametrize("load_by", [load_by_module, load_by_file])
def test_error_for_an_unusable_handler_is_one_line_that_names_it(
    load_by: Any, source: str, attribute: str, module: Write
) -> None:
    file = module(source)
    with pytest.raises(ConfigError) as caught:
        load_by(file, attribute)
    message = str(caught.value)
    assert file.stem in message
    assert f":{attribute}" in message
    assert "\n" not in message


@pytest.mark.message_text
@pytest.mark.parametrize(("source", "attribute", "parts"), UNUSABLE)
@pytest.mark.parametrize("load_by", [load_by_module, load_by_file])
def test_message_for_an_unusable_handler_has_the_fault_and_its_line(
    load_by: Any, source: str, attribute: str, parts: tuple[str, ...], module: Write
) -> None:
    file = module(source)
    with pytest.raises(ConfigError) as caught:
        load_by(file, attribute)
    message = str(caught.value)
    assert message.startswith("the handler ")
    for part in parts:
        assert part in message


NO_TEXT = "class E({base}):\n def __str__(self): raise RuntimeError\n"


@pytest.mark.parametrize(
    "source",
    [
        NO_TEXT.format(base="Exception") + "raise E\n",
        NO_TEXT.format(base="ImportError") + "raise E\n",
        NO_TEXT.format(base="Exception") + "class A:\n def capabilities(self): raise E\n"
        " def handle(self, body, memory): pass\n",
    ],
    ids=["module", "import", "capabilities"],
)
def test_exception_without_text_does_not_hide_the_config_error(source: str, module: Write) -> None:
    file = module(source)
    with pytest.raises(ConfigError):
        load_by_file(file, "A")


def test_missing_module_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no_such_agent:handle"):
        load(parse_handler("no_such_agent:handle", Path("/nowhere")))


@pytest.mark.message_text
def test_message_for_a_missing_module_has_pythons_error() -> None:
    message = r"no_such_agent:handle cannot be imported: ModuleNotFoundError: No module"
    with pytest.raises(ConfigError, match=message):
        load(parse_handler("no_such_agent:handle", Path("/nowhere")))


@pytest.mark.parametrize("file_name", ["agent.py", "sub/agent.txt"])
def test_handler_file_that_is_not_python_is_refused(
    file_name: str, tmp_path: Path, module: Write
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / file_name).write_bytes(b"\x00\xff\x00")
    with pytest.raises(ConfigError, match=file_name):
        load(parse_handler(f"{file_name}:handle", tmp_path))


CAPABILITIES = """
    class Agent:
        def handle(self, body, memory): return body, memory
        def capabilities(self): return {}
"""
INVALID_CAPABILITIES = [
    ("'search'", "capabilities() must return a list of strings"),
    ("[1]", "capabilities() must return a list of strings"),
    ("None", "capabilities() must return a list of strings"),
    ("1 / 0", "capabilities() failed: ZeroDivisionError: division by zero"),
    ("exit(3)", "capabilities() failed: SystemExit: 3"),
]


@pytest.mark.parametrize("returned", [returned for returned, _ in INVALID_CAPABILITIES])
def test_capabilities_other_than_a_list_of_strings_are_refused(
    returned: str, module: Write
) -> None:
    file = module(CAPABILITIES.format(returned))
    with pytest.raises(ConfigError) as caught:
        load_by_module(file, "Agent")
    assert "\n" not in str(caught.value)


@pytest.mark.message_text
@pytest.mark.parametrize(("returned", "message"), INVALID_CAPABILITIES)
def test_message_for_invalid_capabilities_names_the_fault(
    returned: str, message: str, module: Write
) -> None:
    file = module(CAPABILITIES.format(returned))
    with pytest.raises(ConfigError) as caught:
        load_by_module(file, "Agent")
    assert message in str(caught.value)
