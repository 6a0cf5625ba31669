"""`worker.handler`: every form that a handler may have is loaded, every other is one clear line."""

from __future__ import annotations

import asyncio
import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from shared.handlers import parse_handler
from worker.handler import Handler, load

_numbers = count()
Write = Callable[[str], Path]


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Write]:
    """Write a module of a name that no other test imported; forget it afterwards."""
    path, modules = list(sys.path), set(sys.modules)

    def write(source: str) -> Path:
        file = tmp_path / f"agent_{next(_numbers)}.py"
        file.write_text(textwrap.dedent(source))
        return file

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def by_module(file: Path, attribute: str) -> Handler:
    return load(parse_handler(f"{file.stem}:{attribute}", file.parent))


def by_file(file: Path, attribute: str) -> Handler:
    return load(parse_handler(f"{file.name}:{attribute}", file.parent))


def answer(handler: Handler) -> Any:
    """Return what the handler answers to `q`."""
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


@pytest.mark.parametrize("how", [by_module, by_file])
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
def test_handler_of_each_form_is_loaded_and_answers(
    how: Any, attribute: str, is_async: bool, result: str, module: Write
) -> None:
    handler = how(module(FORMS), attribute)
    assert handler.is_async is is_async
    assert answer(handler) == (result, {})
    assert (handler.capabilities, handler.setup, handler.close) == ((), None, None)


def test_object_may_have_capabilities_and_a_life_cycle(module: Write) -> None:
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
    handler = by_module(file, "Agent")
    assert handler.capabilities == ("search", "echo")
    assert handler.setup is not None
    assert handler.close is not None
    handler.setup()
    handler.close()
    assert answer(handler) == (["setup", "close"], {})


def test_attributes_of_a_plain_function_are_no_life_cycle(module: Write) -> None:
    file = module("def handle(body, memory): return body, memory\nhandle.setup = handle.capabilities = print\n")
    handler = by_module(file, "handle")
    assert (handler.setup, handler.capabilities) == (None, ())


@pytest.mark.parametrize("how", [by_module, by_file])
def test_handler_imports_what_lies_beside_it(how: Any, module: Write) -> None:
    sibling = module("WORD = 'from the sibling'\n")
    file = module(f"def handle(body, memory):\n    import {sibling.stem}\n    return {sibling.stem}.WORD, memory\n")
    assert answer(how(file, "handle")) == ("from the sibling", {})


def test_file_of_a_known_modules_name_does_not_become_that_module(tmp_path: Path, module: Write) -> None:
    (tmp_path / "json.py").write_text("def handle(body, memory): return body, memory\n")
    import json

    assert answer(load(parse_handler("json.py:handle", tmp_path))) == ("q", {})
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("name", "file", "taken"),
    [
        ("queue", "queue.py", "queue.py"),
        ("time", "time.py", "a module of Python itself"),
        ("json.agent", "json/__init__.py", "json"),
        ("msgspec", "msgspec.py", "msgspec"),
    ],
)
def test_module_whose_name_is_taken_is_an_error_that_names_both(
    name: str, file: str, taken: str, tmp_path: Path, module: Write
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("def handle(body, memory): return body, memory\n")
    importlib.import_module(name.partition(".")[0])
    with pytest.raises(ConfigError) as caught:
        load(parse_handler(f"{name}:handle", tmp_path))
    told = str(caught.value)
    assert f"{name}:handle is not that of {tmp_path / file}: the name {name.partition('.')[0]!r} is taken by" in told
    assert taken in told.partition("taken by")[2]


def test_module_that_puts_something_else_in_its_place_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "replaces_itself.py").write_text(
        "import sys\n"
        "class Module:\n"
        "    def handle(self, body, memory): return body, memory\n"
        "sys.modules[__name__] = Module()\n"
    )
    assert answer(load(parse_handler("replaces_itself:handle", tmp_path))) == ("q", {})


def test_module_that_is_reached_by_a_link_is_no_other(tmp_path: Path, module: Write) -> None:
    file = module("def handle(body, memory): return body, memory\n")
    link = tmp_path / "link"
    link.symlink_to(tmp_path, target_is_directory=True)
    by_module(file, "handle")
    assert answer(load(parse_handler(f"{file.stem}:handle", link))) == ("q", {})


def test_relative_import_in_a_file_is_told_how_it_is_named(tmp_path: Path, module: Write) -> None:
    file = module("from .helper import word\n")
    with pytest.raises(ConfigError, match=rf"relative import.*name it as a module, package\.{file.stem}:handle$"):
        by_file(file, "handle")


def test_module_that_was_made_of_a_file_is_taken_where_that_is_wanted(module: Write) -> None:
    file = module("def handle(body, memory): return body, memory\n")
    sys.path.insert(0, str(file.parent))
    made = importlib.import_module(file.stem)
    ref = parse_handler(f"{file.name}:handle", file.parent)
    assert load(ref, reuse=True).handle is made.handle
    assert load(ref).handle is not made.handle
    assert load(ref, reuse=True).handle is made.handle, "and not what was loaded from the file"


def test_file_may_define_what_is_looked_up_by_its_modules_name(module: Write) -> None:
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
    assert answer(by_file(file, "handle")) == ("q", {})


def test_module_beside_the_configuration_is_found_before_the_python_path(tmp_path: Path, module: Write) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    for place in ("first", "second"):
        (tmp_path / place / "twice_there.py").write_text(f"def handle(body, memory): return {place!r}, memory\n")
    sys.path.append(str(tmp_path / "second"))
    assert answer(load(parse_handler("twice_there:handle", tmp_path / "first"))) == ("first", {})


@pytest.mark.parametrize(
    ("source", "attribute", "says"),
    [
        (FORMS, "handle", ("does not exist", "has no 'handle'", "it has Call, CallLater, Later, Plain")),
        ("_x = 1", "handle", ("does not exist", "has no 'handle'")),
        (FORMS, "Static.Gone", ("has no 'Gone'",)),
        ("handle = 5", "handle", ("is a int; expected a function, or a class with handle()",)),
        ("class A: pass", "A", ("is a A; expected a function, or a class with handle()",)),
        ("class A: handle = 5", "A", ("expected a function, or a class with handle()",)),
        ("def handle(body): pass", "handle", ("must take (body, memory): too many positional arguments",)),
        ("def handle(a, b, c): pass", "handle", ("must take (body, memory): missing a required argument: 'c'",)),
        ("def handle(*, body, memory): pass", "handle", ("must take (body, memory)",)),
        ("class A:\n def handle(body, memory): pass", "A", ("must take (body, memory)",)),
        ("\n\nimport no_such_thing", "handle", ("ModuleNotFoundError: No module named 'no_such_thing'", "line 3)")),
        ("x = 1\ny = x / 0\n", "handle", ("ZeroDivisionError: division by zero", "line 2)")),
        ("def f():\n  raise ValueError('a\\nb')\nf()\n", "handle", ("ValueError: a b", "line 2)")),
        ("def handle(body, memory)\n", "handle", ("SyntaxError: expected ':'", "line 1)")),
        ("import sys\nsys.exit(3)\n", "handle", ("SystemExit: 3", "line 2)")),
        ("raise KeyboardInterrupt\n", "handle", ("KeyboardInterrupt", "line 1)")),
        ("class A:\n def __init__(self): raise OSError('no db')\n", "A", ("OSError: no db", "line 2)")),
        ("class A:\n def __init__(self, url): pass\n", "A", ("TypeError", "missing 1 required positional argument")),
    ],
)
@pytest.mark.parametrize("how", [by_module, by_file])
def test_handler_that_cannot_be_used_is_one_line_that_says_what_and_where(
    how: Any, source: str, attribute: str, says: tuple[str, ...], module: Write
) -> None:
    file = module(source)
    with pytest.raises(ConfigError) as caught:
        how(file, attribute)
    told = str(caught.value)
    assert told.startswith("the handler ")
    assert file.stem in told
    assert f":{attribute}" in told
    for part in says:
        assert part in told
    assert "\n" not in told


def test_module_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no_such_agent:handle cannot be imported: ModuleNotFoundError: No module"):
        load(parse_handler("no_such_agent:handle", Path("/nowhere")))


@pytest.mark.parametrize("file_name", ["agent.py", "sub/agent.txt"])
def test_file_that_is_no_python_is_told(file_name: str, tmp_path: Path, module: Write) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / file_name).write_bytes(b"\x00\xff\x00")
    with pytest.raises(ConfigError, match="the handler"):
        load(parse_handler(f"{file_name}:handle", tmp_path))


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("'search'", "capabilities() must return a list of strings"),
        ("[1]", "capabilities() must return a list of strings"),
        ("None", "capabilities() must return a list of strings"),
        ("1 / 0", "capabilities() failed: ZeroDivisionError: division by zero"),
        ("exit(3)", "capabilities() failed: SystemExit: 3"),
    ],
)
def test_capabilities_that_are_no_list_of_strings_are_refused(returned: str, says: str, module: Write) -> None:
    file = module(
        f"""
        class Agent:
            def handle(self, body, memory): return body, memory
            def capabilities(self): return {returned}
        """
    )
    with pytest.raises(ConfigError) as caught:
        by_module(file, "Agent")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
