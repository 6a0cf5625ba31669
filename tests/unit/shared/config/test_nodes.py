"""`shared.config.nodes`: where nodes are configured, and what an address means."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.config.nodes import (
    NodeAddress,
    NodeList,
    emergence_conf_path,
    parse_node,
    resolve_nodes,
)
from shared.errors import ConfigError
from worker.node.session import Session

ABSENT = Path("/nowhere/emergence.conf")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        # without a port: loopback hosts are 8080 over tcp, any other 443 over tls
        ("localhost", "ws://localhost:8080/ws"),
        ("127.0.0.1", "ws://127.0.0.1:8080/ws"),
        ("::1", "ws://[::1]:8080/ws"),
        ("[::1]", "ws://[::1]:8080/ws"),
        ("[0:0:0:0:0:0:0:1]", "ws://[::1]:8080/ws"),
        ("disco.example.com", "wss://disco.example.com:443/ws"),
        ("disco.example.com.", "wss://disco.example.com.:443/ws"),
        ("192.0.2.7", "wss://192.0.2.7:443/ws"),
        ("[2001:DB8::1]", "wss://[2001:db8::1]:443/ws"),
        # with a port: loopback hosts are tcp, 443 is tls, anything else tcp
        ("localhost:9000", "ws://localhost:9000/ws"),
        ("localhost:443", "ws://localhost:443/ws"),
        ("[::1]:443", "ws://[::1]:443/ws"),
        ("[::1]:9000", "ws://[::1]:9000/ws"),
        ("disco.example.com:443", "wss://disco.example.com:443/ws"),
        ("disco.example.com:8080", "ws://disco.example.com:8080/ws"),
        ("b:9000", "ws://b:9000/ws"),
        ("[2001:db8::1]:443", "wss://[2001:db8::1]:443/ws"),
        ("[fe80::1%eth0]:9000", "ws://[fe80::1%eth0]:9000/ws"),
        # a scheme selects the transport
        ("wss://disco.example.net:8443", "wss://disco.example.net:8443/ws"),
        ("wss://localhost", "wss://localhost:443/ws"),
        ("ws://disco.example.com", "ws://disco.example.com:80/ws"),
        ("ws://disco.example.com:443/", "ws://disco.example.com:443/ws"),
        ("WS://localhost:1/ws", "ws://localhost:1/ws"),
        ("wss://[::1]:65535/ws/", "wss://[::1]:65535/ws"),
        # white space, upper case and leading zeros
        ("  LocalHost \n", "ws://localhost:8080/ws"),
        ("my_host-1.lan:08080", "ws://my_host-1.lan:8080/ws"),
    ],
)
def test_address_means_the_same_url_as_in_the_reference(text: str, url: str) -> None:
    assert parse_node(text).url == url


INVALID = [
    ("", "the host is empty"),
    (":8080", "the host is empty"),
    ("ws://", "the host is empty"),
    ("localhost:", "the port is ''"),
    ("localhost:0", "the port is '0'"),
    ("localhost:65536", "the port is '65536'"),
    ("localhost:-1", "the port is '-1'"),
    ("localhost:8080x", "the port is '8080x'"),
    ("localhost:٨٠", "the port is"),
    ("[::1]:", "the port is ''"),
    ("[::1", "expected HOST"),
    ("[::1]9000", "expected HOST"),
    ("[localhost]:1", "'localhost' is not an IPv6 address"),
    ("[fe80::1%a b]", "a zone that names no network interface"),
    ("2001:db8::1", "an IPv6 address goes in brackets"),
    ("::1:9000", "an IPv6 address goes in brackets"),
    ("http://localhost", "the scheme is 'http', expected ws or wss"),
    ("ws://localhost/other", "is not a host name"),
    ("ws://localhost:1/other", "the port is '1/other'"),
    ("user@host", "it holds a user or password"),
    ("a b", "is not a host name"),
    ("-a", "is not a host name"),
    ("a..b", "is not a host name"),
    ("a" * 64, "is not a host name"),
    (".".join(["a" * 60] * 5), "is not a host name"),
    ("münchen.example", "is not a host name"),
    ("localhost?token=x", "set a token with jwt_token_file"),
]


@pytest.mark.parametrize("text", [text for text, _ in INVALID])
def test_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - a wording test checks the message
        parse_node(text)


@pytest.mark.message_text
@pytest.mark.parametrize(("text", "message"), INVALID)
def test_message_for_an_invalid_address_names_the_fault(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_node(text)


address_like = st.one_of(
    st.text(),
    st.text(alphabet="[]:/.%-_ws19ab\t ?@"),
    st.builds(
        "{}://{}:{}".format, st.sampled_from(["ws", "wss", "x"]), st.text(max_size=9), st.integers()
    ),
    st.builds("{}:{}".format, st.ip_addresses(), st.integers()),
    st.builds(
        "[{}%{}]:{}".format, st.ip_addresses(v=6), st.text(max_size=5), st.integers(0, 70_000)
    ),
)


@given(address_like)
@example("h:" + "9" * 5000)
def test_any_text_is_a_usable_address_or_a_value_error(text: str) -> None:
    try:
        node = parse_node(text)
    except ValueError:
        return
    assert 1 <= node.port <= 65535
    assert node.authority.isascii()
    assert node.authority.isprintable()
    assert " " not in node.authority
    request = Session(node, "a", (), "token", 4096).take_output()
    assert request.startswith(b"GET /ws?token=token HTTP/1.1\r\n")


@given(
    st.ip_addresses() | st.from_regex(r"[a-z0-9]{1,9}(\.[a-z0-9]{1,9}){0,2}", fullmatch=True),
    st.integers(1, 65535),
)
def test_address_as_text_is_read_back_as_the_same_address(host: object, port: int) -> None:
    node = parse_node(f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}")
    assert parse_node(str(node)) == parse_node(node.url) == node


# --- sources ---


def conf(folder: Path, text: str) -> Path:
    path = folder / "emergence.conf"
    path.write_text(text)
    return path


def urls(found: NodeList) -> list[str]:
    return [str(node) for node in found.nodes]


def nodes_of_each_source(folder: Path) -> list[NodeList]:
    """Return the nodes of an agent, the environment, the file and the default."""
    environ = {"EM_DISCO_HOST": "env", "EM_DISCO_PORT": "1"}
    file = conf(folder, "[em_disco]\nnodes = file:2\n")
    return [
        resolve_nodes(["agent:3"], environ=environ, emergence_conf=file),
        resolve_nodes(None, environ=environ, emergence_conf=file),
        resolve_nodes(None, environ={}, emergence_conf=file),
        resolve_nodes(None, environ={}, emergence_conf=ABSENT),
    ]


def test_nodes_come_from_agent_environment_file_or_default_in_that_order(tmp_path: Path) -> None:
    assert [urls(found) for found in nodes_of_each_source(tmp_path)] == [
        ["ws://agent:3"],
        ["ws://env:1"],
        ["ws://file:2"],
        ["ws://localhost:8080"],
    ]


@pytest.mark.message_text
def test_origin_names_the_source_of_the_nodes(tmp_path: Path) -> None:
    assert [found.origin for found in nodes_of_each_source(tmp_path)] == [
        "nodes",
        "EM_DISCO_HOST/EM_DISCO_PORT",
        str(tmp_path / "emergence.conf"),
        "the default",
    ]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"EM_DISCO_HOST": "disco.example.com"}, "wss://disco.example.com:443"),
        ({"EM_DISCO_HOST": "localhost"}, "ws://localhost:8080"),
        ({"EM_DISCO_HOST": " h ", "EM_DISCO_PORT": " 9 "}, "ws://h:9"),
        ({"EM_DISCO_HOST": "h", "EM_DISCO_PORT": "443"}, "wss://h:443"),
        ({"EM_DISCO_HOST": "::1"}, "ws://[::1]:8080"),
        ({"EM_DISCO_HOST": "::1", "EM_DISCO_PORT": "9"}, "ws://[::1]:9"),
        ({"EM_DISCO_HOST": "[::1]", "EM_DISCO_PORT": "9"}, "ws://[::1]:9"),
        ({"EM_DISCO_HOST": "wss://h", "EM_DISCO_PORT": "9"}, "wss://h:9"),
        ({"EM_DISCO_PORT": "9"}, "ws://localhost:9"),
        ({"EM_DISCO_HOST": " ", "EM_DISCO_PORT": ""}, "ws://localhost:8080"),
    ],
)
def test_environment_configures_one_node_by_host_and_port(
    environ: dict[str, str], expected: str
) -> None:
    assert urls(resolve_nodes(None, environ=environ, emergence_conf=ABSENT)) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[em_disco]\nnodes = a, b:9000\n", ["wss://a:443", "ws://b:9000"]),
        ("[em_disco]\nnodes=a,b:9000,\n", ["wss://a:443", "ws://b:9000"]),
        (
            "[em_disco]\nnodes =\n  a\n  b:9000 ,\n\n  [::1]:7\n",
            ["wss://a:443", "ws://b:9000", "ws://[::1]:7"],
        ),
        ("[em_disco]\nnodes: wss://a:1 ; the first\n", ["wss://a:1"]),
        ("# a comment\n[other]\nnodes = x\n[em_disco]\nNODES = a # why\n", ["wss://a:443"]),
        ("[em_disco]\nnodes = a\nhost = b\nport = 1\n", ["wss://a:443"]),
        ("[em_disco]\nnodes = a\nnodes = b\n", ["wss://b:443"]),
        ("[em_disco]\nhost = h\n", ["wss://h:443"]),
        ("[em_disco]\nhost = h\nport = 9\n", ["ws://h:9"]),
        ("[em_disco]\nport = 9\n", ["ws://localhost:9"]),
        ("[em_disco]\nhost = ::1\nport = 9\n", ["ws://[::1]:9"]),
        ("\ufeff[em_disco]\nhost = h\n", ["wss://h:443"]),
        ("[em_disco]\r\nhost = h\r\n", ["wss://h:443"]),
        ("[em_disco]\nnodes =\n", ["ws://localhost:8080"]),
        ("[other]\nnodes = a\n", ["ws://localhost:8080"]),
        ("", ["ws://localhost:8080"]),
    ],
)
def test_emergence_conf_configures_nodes_in_each_supported_form(
    text: str, expected: list[str], tmp_path: Path
) -> None:
    found = resolve_nodes(None, environ={}, emergence_conf=conf(tmp_path, text))
    assert urls(found) == expected


INVALID_CONF = [
    ("nodes = s3cr3t\n", r"is not an INI file \(line 1\)"),
    ("[em_disco]\nx = 1\ns3cr3t\n", r"is not an INI file \(line 3\)"),
    ("[em_disco\n", "is not an INI file"),
    ("[em_disco]\nnodes = ,\n", "the list is empty"),
    ("[em_disco]\nnodes = a, a\n", "the node wss://a:443 is named twice"),
    ("[em_disco]\nport = x\n", "the port is 'x'"),
    ("[em_disco]\nnodes = 100%\n", "is not a host name"),
]


@pytest.mark.parametrize("text", [text for text, _ in INVALID_CONF])
def test_error_for_an_invalid_emergence_conf_is_one_line_without_its_values(
    text: str, tmp_path: Path
) -> None:
    path = conf(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        resolve_nodes(None, environ={}, emergence_conf=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "s3cr3t" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.message_text
@pytest.mark.parametrize(("text", "message"), INVALID_CONF)
def test_message_for_an_invalid_emergence_conf_names_the_fault(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_nodes(None, environ={}, emergence_conf=conf(tmp_path, text))


@pytest.fixture(params=["folder", "not text"])
def unreadable_conf(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """Return an emergence.conf that cannot be read, and its message."""
    if request.param == "folder":
        return tmp_path, "cannot be read: Is a directory"
    file = tmp_path / "binary"
    file.write_bytes(b"\xff")
    return file, "is not UTF-8 text"


def test_emergence_conf_that_cannot_be_read_is_refused(unreadable_conf: tuple[Path, str]) -> None:
    path, _ = unreadable_conf
    with pytest.raises(ConfigError, match=str(path)):
        resolve_nodes(None, environ={}, emergence_conf=path)


@pytest.mark.message_text
def test_message_for_an_unreadable_emergence_conf_has_the_reason(
    unreadable_conf: tuple[Path, str],
) -> None:
    path, message = unreadable_conf
    with pytest.raises(ConfigError, match=message):
        resolve_nodes(None, environ={}, emergence_conf=path)


def test_emergence_conf_below_a_file_is_treated_as_absent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = resolve_nodes(None, environ={}, emergence_conf=tmp_path / "file" / "emergence.conf")
    absent = resolve_nodes(None, environ={}, emergence_conf=ABSENT)
    assert found == absent


def test_emergence_conf_is_found_in_the_users_home(tmp_path: Path) -> None:
    path = tmp_path / ".config/emergence/emergence.conf"
    assert emergence_conf_path({"HOME": str(tmp_path)}) == path
    path.parent.mkdir(parents=True)
    path.write_text("[em_disco]\nnodes = found-at-home\n")
    assert urls(resolve_nodes(None, environ={"HOME": str(tmp_path)})) == ["wss://found-at-home:443"]


INVALID_LISTS = [
    ([], "nodes: the list is empty"),
    ([""], "nodes: '' is not a node's address"),
    (["a", "A:443"], "nodes: the node wss://a:443 is named twice"),
    (["a?token=s3cr3t"], r"nodes: 'a'\?\.\.\. is not a node's address"),
]


@pytest.mark.parametrize("nodes", [nodes for nodes, _ in INVALID_LISTS])
def test_invalid_node_list_of_an_agent_is_refused(nodes: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_nodes(nodes, environ={}, emergence_conf=ABSENT)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.message_text
@pytest.mark.parametrize(("nodes", "message"), INVALID_LISTS)
def test_message_for_an_invalid_node_list_names_the_fault(nodes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_nodes(nodes, environ={}, emergence_conf=ABSENT)


conf_line = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "[em_disco]",
            "[DEFAULT]",
            "[other]",
            "[",
            "[]",
            "[em_disco",
            "nodes",
            "nodes = a, b:9",
            "=",
            ":",
        ]
    ),
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["nodes", "host", "port"]),
        st.sampled_from("=: "),
        st.text(max_size=20),
    ),
)
conf_text = st.text() | st.lists(
    st.builds("{}{}".format, st.sampled_from(["", " ", "\t"]), conf_line)
).map("\n".join)


@given(conf_text)
def test_any_emergence_conf_gives_nodes_or_a_one_line_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emergence.conf"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            found = resolve_nodes(None, environ={}, emergence_conf=path)
        except ConfigError as exc:
            message = str(exc)
        else:
            assert found.nodes
            assert all(isinstance(node, NodeAddress) for node in found.nodes)
            return
    assert message.startswith(str(path))
    assert "\n" not in message
