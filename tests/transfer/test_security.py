"""Ports and channels: who is let in, who is refused and how fast, what is never shown, and which files are named as bad."""

import ast
import asyncio
import contextlib
import dataclasses
import pathlib
import pickle
import re
import socket
import time
from concurrent import futures

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing.certificates import TOKEN_FILE, CertificateOptions, make_certificates
from prfaas_jax.transfer import security as module
from prfaas_jax.transfer.channel import CHANNEL_OPTIONS, SERVER_OPTIONS
from prfaas_jax.transfer.security import (
    NONE,
    Security,
    add_port,
    aio_server_interceptors,
    check_listen,
    open_aio_channel,
    open_channel,
    server_interceptors,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVICE = "test.Echo"
ARITIES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
# A refusal is a refusal when it comes by itself, long before the call's deadline.
DEADLINE_S, PROMPTLY_S = 20.0, 5.0


def made(path, **options) -> CertificateOptions:
    certificates = CertificateOptions(str(path), **({"names": "server,client"} | options))
    make_certificates(certificates)
    return certificates


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> CertificateOptions:
    return made(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> CertificateOptions:
    return made(tmp_path_factory.mktemp("theirs"))


def token_of(certificates: CertificateOptions) -> str:
    return (pathlib.Path(certificates.out) / TOKEN_FILE).read_text().strip()


class Handlers:
    """All four kinds of methods, for both kinds of servers; `served` counts calls that reached one."""

    def __init__(self):
        self.served = 0

    def _joined(self, requests) -> bytes:
        self.served += 1
        return b"+".join(requests)

    def sync(self):
        split = lambda text: iter(text.split(b"+"))  # noqa: E731
        one = {
            "unary_unary": lambda request, context: self._joined([request]),
            "unary_stream": lambda request, context: split(self._joined([request])),
            "stream_unary": lambda requests, context: self._joined(requests),
            "stream_stream": lambda requests, context: split(self._joined(requests)),
        }
        return self._generic(one)

    def aio(self):
        async def unary_unary(request, context):
            return self._joined([request])

        async def unary_stream(request, context):
            for part in self._joined([request]).split(b"+"):
                yield part

        async def stream_unary(requests, context):
            return self._joined([request async for request in requests])

        async def stream_stream(requests, context):
            for part in self._joined([request async for request in requests]).split(b"+"):
                yield part

        return self._generic({f.__name__: f for f in (unary_unary, unary_stream, stream_unary, stream_stream)})

    def _generic(self, methods):
        made = {name: getattr(grpc, f"{name}_rpc_method_handler")(method) for name, method in methods.items()}
        return (grpc.method_handlers_generic_handler(SERVICE, made),)


@contextlib.contextmanager
def served(security: Security, handlers: Handlers, address="127.0.0.1:0", options=SERVER_OPTIONS):
    pool = futures.ThreadPoolExecutor(2)
    server = grpc.server(pool, handlers=handlers.sync(), options=options, interceptors=server_interceptors(security))
    bound = add_port(server, "address", address, security)
    server.start()
    try:
        yield bound
    finally:
        server.stop(0).wait(5)
        pool.shutdown()


@contextlib.asynccontextmanager
async def aio_served(security: Security, handlers: Handlers):
    server = grpc.aio.server(handlers=handlers.aio(), options=SERVER_OPTIONS, interceptors=aio_server_interceptors(security))
    bound = add_port(server, "address", "127.0.0.1:0", security)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(0)


def call(channel, arity: str, **kwargs) -> bytes:
    method = getattr(channel, arity)(f"/{SERVICE}/{arity}")
    request = b"a+b" if arity.startswith("unary") else iter([b"a", b"b"])
    answer = method(request, timeout=DEADLINE_S, **kwargs)
    return b"+".join(answer) if arity.endswith("stream") else answer


async def aio_call(channel, arity: str) -> bytes:
    method = getattr(channel, arity)(f"/{SERVICE}/{arity}")
    request = b"a+b" if arity.startswith("unary") else [b"a", b"b"]
    answer = method(request, timeout=DEADLINE_S)
    return b"+".join([part async for part in answer]) if arity.endswith("stream") else await answer


def refused(channel, arity="unary_stream", **kwargs) -> grpc.RpcError:
    """The error that the call ends with, promptly."""
    begun = time.monotonic()
    with channel, pytest.raises(grpc.RpcError) as caught:
        call(channel, arity, **kwargs)
    assert time.monotonic() - begun < PROMPTLY_S
    return caught.value


def raw_channel(address: str, ca: str, cert: str | None = None, key: str | None = None) -> grpc.Channel:
    """What somebody without our code may try."""
    ca, cert, key = (pathlib.Path(path).read_bytes() if path else None for path in (ca, cert, key))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=CHANNEL_OPTIONS)


# --- let in ------------------------------------------------------------------------------------------------------------------------


def securities(certificates: CertificateOptions) -> dict[str, tuple[Security, Security]]:
    """(server's, client's)."""
    server, client = certificates.security("server"), certificates.security("client")
    return {
        "tls and token": (server, client),
        "tls": tuple(dataclasses.replace(s, token_file=None) for s in (server, client)),
        "token": (Security(token_file=server.token_file, insecure=True),) * 2,
        "none": (NONE, NONE),
    }


@pytest.mark.parametrize("kind", ["tls and token", "tls", "token", "none"])
def test_all_four_kinds_of_calls_pass_between_sync_and_asyncio(ours, kind):
    server, client = securities(ours)[kind]
    handlers = Handlers()

    async def scenario(address: str) -> None:
        async with open_aio_channel(address, CHANNEL_OPTIONS, client) as channel:
            for arity in ARITIES:
                assert await aio_call(channel, arity) == b"a+b"

    async def all_aio() -> None:
        async with aio_served(server, handlers) as address:
            await scenario(address)
            with open_channel(address, CHANNEL_OPTIONS, client) as channel:
                for arity in ARITIES:
                    assert await asyncio.to_thread(call, channel, arity) == b"a+b"

    asyncio.run(all_aio())
    with served(server, handlers) as address:
        asyncio.run(scenario(address))
        with open_channel(address, CHANNEL_OPTIONS, client) as channel:
            for arity in ARITIES:
                assert call(channel, arity) == b"a+b"
            method = channel.unary_unary(f"/{SERVICE}/unary_unary")
            assert method.future(b"f", timeout=DEADLINE_S).result() == b"f"
            assert method.with_call(b"w", timeout=DEADLINE_S, metadata=(("other", "kept"),))[0] == b"w"
            assert grpc.channel_ready_future(channel).result(PROMPTLY_S) is None
    assert handlers.served == 4 * len(ARITIES) + 2


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_every_name_of_loopback_is_in_the_certificates(ours, host):
    server, client = ours.security("server"), ours.security("client")
    with served(server, Handlers(), f"{host}:0") as address, open_channel(address, CHANNEL_OPTIONS, client) as channel:
        assert address.startswith(f"{host}:") and call(channel, "unary_unary") == b"a+b"


# --- refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "client"),
    [
        ({}, {"tls_ca": 1, "tls_cert": 1, "tls_key": 1}),
        ({}, {"tls_ca": 1}),
        ({}, {"tls_cert": 1, "tls_key": 1}),
        ({"tls_cert": 1, "tls_key": 1}, {}),
        ({"tls_ca": 1}, {}),
    ],
    ids=["other client", "client trusts another CA", "client of another CA", "server of another CA", "server trusts another CA"],
)
def test_either_side_refuses_a_certificate_of_another_ca(ours, theirs, server, client, capfd):
    # The other side's files, token included, are those of another set only where the case says so.
    other = {"server": theirs.security("server"), "client": theirs.security("client")}
    own = {"server": ours.security("server"), "client": ours.security("client")}
    sides = {
        name: dataclasses.replace(own[name], **{field: getattr(other[name], field) for field in swapped})
        for name, swapped in {"server": server, "client": client}.items()
    }
    handlers = Handlers()
    with served(sides["server"], handlers) as address:
        assert refused(open_channel(address, CHANNEL_OPTIONS, sides["client"])).code() is grpc.StatusCode.UNAVAILABLE
    assert not handlers.served
    assert not [secret for secret in (token_of(ours), token_of(theirs)) if secret in "".join(capfd.readouterr())]


def test_no_client_certificate_is_refused(ours):
    handlers, server = Handlers(), ours.security("server")
    with served(server, handlers) as address:
        error = refused(raw_channel(address, server.tls_ca), metadata=(("authorization", f"Bearer {token_of(ours)}"),))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert not handlers.served


def test_an_expired_certificate_is_refused_by_the_peer_and_named_by_its_owner(ours, tmp_path):
    old = made(tmp_path, days=0.5 / 86400)
    time.sleep(1.1)  # a certificate's times are whole seconds
    with pytest.raises(InvalidInput, match=r"tls_cert='.*client.crt': expected a certificate that is valid now"):
        old.security("client")
    ca, cert, key = (str(tmp_path / name) for name in ("ca.crt", "client.crt", "client.key"))
    own = ours.security("server")
    handlers = Handlers()
    with served(dataclasses.replace(own, tls_ca=ca), handlers) as address:
        assert refused(raw_channel(address, own.tls_ca, cert, key)).code() is grpc.StatusCode.UNAVAILABLE
    assert not handlers.served


def test_a_server_under_a_name_that_is_not_its_own_is_refused(ours):
    server, client = ours.security("server"), ours.security("client")
    handlers = Handlers()
    with served(server, handlers, "127.0.0.2:0") as address:
        assert refused(open_channel(address, CHANNEL_OPTIONS, client)).code() is grpc.StatusCode.UNAVAILABLE
    assert not handlers.served


def test_plaintext_and_tls_do_not_mix(ours):
    server, client = ours.security("server"), ours.security("client")
    handlers = Handlers()
    plain = Security(token_file=client.token_file, insecure=True)
    with served(server, handlers) as address:
        assert refused(open_channel(address, CHANNEL_OPTIONS, plain)).code() is grpc.StatusCode.UNAVAILABLE
    with served(plain, handlers) as address:
        assert refused(open_channel(address, CHANNEL_OPTIONS, client)).code() is grpc.StatusCode.UNAVAILABLE
    assert not handlers.served


def headers(token: str) -> dict[str, tuple]:
    return {
        "none": (),
        "another": (("authorization", "Bearer " + "x" * len(token)),),
        "shorter": (("authorization", f"Bearer {token[:-1]}"),),
        "longer": (("authorization", f"Bearer {token}x"),),
        "no scheme": (("authorization", token),),
        "other scheme": (("authorization", f"Basic {token}"),),
        "twice": (("authorization", f"Bearer {token}"), ("authorization", "Bearer other")),
        "another header": (("proxy-authorization", f"Bearer {token}"),),
        "empty": (("authorization", ""),),
    }


@pytest.mark.parametrize("header", list(headers("")))
@pytest.mark.parametrize("arity", ARITIES)
def test_calls_without_the_token_are_unauthenticated(ours, header, arity, capfd):
    token = token_of(ours)
    server = Security(token_file=ours.security("server").token_file, insecure=True)
    handlers = Handlers()
    with served(server, handlers) as address:
        error = refused(open_channel(address, CHANNEL_OPTIONS), arity, metadata=headers(token)[header])
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert token not in str(error)

    async def aio() -> grpc.RpcError:
        async with aio_served(server, handlers) as address:
            return await asyncio.to_thread(refused, open_channel(address, CHANNEL_OPTIONS), arity, metadata=headers(token)[header])

    error = asyncio.run(aio())
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED and token not in str(error)
    assert not handlers.served
    out = "".join(capfd.readouterr())
    assert token not in out and "x" * len(token) not in out and "Traceback" not in out


def test_a_caller_of_another_token_is_unauthenticated_over_tls(ours, theirs):
    client = dataclasses.replace(ours.security("client"), token_file=theirs.security("client").token_file)
    handlers = Handlers()
    with served(ours.security("server"), handlers) as address:
        assert refused(open_channel(address, CHANNEL_OPTIONS, client)).code() is grpc.StatusCode.UNAUTHENTICATED
        # A method that is not there, too: what a server can do is nobody's business.
        with open_channel(address, CHANNEL_OPTIONS, client) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/no.Such/Method")(b"", timeout=DEADLINE_S)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not handlers.served


def test_a_refused_stream_is_not_read(ours):
    """The refusal comes although the caller sends no request: nobody occupies a server by starting to speak."""
    server = Security(token_file=ours.security("server").token_file, insecure=True)
    pause = futures.Future()

    def silent():
        yield pause.result(DEADLINE_S)

    with served(server, Handlers()) as address, open_channel(address, CHANNEL_OPTIONS) as channel:
        begun = time.monotonic()
        answer = channel.stream_unary(f"/{SERVICE}/stream_unary").future(silent(), timeout=DEADLINE_S)
        assert answer.exception().code() is grpc.StatusCode.UNAUTHENTICATED and time.monotonic() - begun < PROMPTLY_S
        pause.set_result(b"")


def test_who_connects_and_says_nothing_is_hung_up_on(ours):
    name = "grpc.server_handshake_timeout_ms"
    assert dict(SERVER_OPTIONS)[name] <= 30_000
    options = tuple((dict(SERVER_OPTIONS) | {name: 500}).items())
    with served(ours.security("server"), Handlers(), options=options) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), PROMPTLY_S) as silent:
            begun = time.monotonic()
            assert silent.recv(1) == b"" and 0.3 < time.monotonic() - begun < PROMPTLY_S


# --- files and secrets -------------------------------------------------------------------------------------------------------------


def test_secrets_are_in_no_text_and_no_pickle(ours):
    security = ours.security("client")
    key = pathlib.Path(security.tls_key).read_text().splitlines()[1]
    shown = [repr(security), str(security), f"{security}", str(dataclasses.asdict(security)), pickle.dumps(security).decode("latin1")]
    assert not [text for text in shown if token_of(ours) in text or key in text]
    copy = pickle.loads(pickle.dumps(security))
    assert copy == security and copy._token == security._token


def bad(tmp_path, ours, theirs) -> dict[str, tuple[dict, str]]:
    """Name -> fields that replace good ones, and what the message says."""
    own, other = ours.security("client"), theirs.security("client")
    key = serialization.load_pem_private_key(pathlib.Path(own.tls_key).read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"password")
    )
    (tmp_path / "locked.key").write_bytes(locked)
    (tmp_path / "garbage").write_text("SECRET-GARBAGE-0123456789 not a certificate\n")
    nowhere, garbage = str(tmp_path / "nowhere"), str(tmp_path / "garbage")
    cases = {f"{field} missing": ({field: nowhere}, f"{field}='{nowhere}': expected a readable file") for field in FILES}
    cases |= {f"{field} a folder": ({field: str(tmp_path)}, f"{field}='{tmp_path}': expected a readable file") for field in FILES}
    cases |= {f"{field} not PEM": ({field: garbage}, f"{field}='{garbage}': expected a PEM file") for field in FILES[:3]}
    cases |= {f"{field} left out": ({field: None}, f"{field}=None: expected a file") for field in FILES[:3]}
    cases["key of another"] = ({"tls_key": other.tls_key}, f"tls_key='{other.tls_key}': expected the private key of tls_cert")
    cases["key encrypted"] = ({"tls_key": str(tmp_path / "locked.key")}, "a private key that is not encrypted")
    cases["key as certificate"] = ({"tls_cert": own.tls_key}, f"tls_cert='{own.tls_key}': expected a PEM file with certificates")
    cases["token without TLS"] = (dict.fromkeys(FILES[:3]), f"token_file='{own.token_file}': expected TLS as well")
    tokens = {
        "empty": b"",
        "only a line end": b"\n",
        "short": b"SECRET-15-chars",
        "two lines": b"SECRET-0123456789\nSECRET-0123456789\n",
        "empty second line": b"SECRET-0123456789\n\n",
        "not ASCII": "SECRET-0123456789-ä".encode(),
        "not text": b"\xff\xfeSECRET-0123456789",
        "spaces": b"SECRET-01234 56789",
        "control characters": b"SECRET-0123456789\x00",
    }
    for name, content in tokens.items():
        path = tmp_path / f"token {name}"
        path.write_bytes(content)
        cases[f"token {name}"] = ({"token_file": str(path)}, f"token_file='{path}': expected a file with one line of at least 16")
    return cases


FILES = ("tls_ca", "tls_cert", "tls_key", "token_file")


def test_bad_files_are_named_and_not_quoted(tmp_path, ours, theirs):
    good = ours.security("client")
    for name, (fields, message) in bad(tmp_path, ours, theirs).items():
        with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
            dataclasses.replace(good, **fields)
        # What a traceback would show counts as well.
        cause = caught.value.__cause__
        assert "SECRET" not in str(caught.value) and (cause is None or isinstance(cause, OSError)), name


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_token_may_end_with_a_line_end(tmp_path, end):
    (tmp_path / "token").write_bytes(f"0123456789abcdef{end}".encode())
    assert Security(token_file=str(tmp_path / "token"), insecure=True)._token == b"0123456789abcdef"


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "example.org:1", "10.0.0.1:0"])
def test_addresses_beyond_loopback_take_tls_or_insecure(ours, address):
    for refuse in (lambda: check_listen("f", address, NONE), lambda: add_port(None, "f", address, NONE)):
        with pytest.raises(InvalidInput, match=rf"f='{re.escape(address)}'.*--tls_ca.*--insecure"):
            refuse()
    expected = tuple(address.rsplit(":", 1))
    for security in (Security(insecure=True), ours.security("server")):
        host, port = check_listen("f", address, security)
        assert (host, str(port)) == expected


def test_ports_and_channels_are_opened_in_one_place_only():
    """Whatever is opened elsewhere would be open to everybody."""
    folders = [ROOT / name for name in ("prfaas_jax", "experiments", "configs")]
    found, servers = [], 0
    for path in (p for folder in folders for p in folder.rglob("*.py") if "_pb2" not in p.name):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name = ast.unparse(node.func)
            if node.func.attr in ("insecure_channel", "secure_channel", "add_insecure_port", "add_secure_port"):
                found += [f"{path}:{node.lineno}: {name}"] if path != pathlib.Path(module.__file__) else []
            if name in ("grpc.server", "grpc.aio.server"):
                servers += 1
                guarded = [k for k in node.keywords if k.arg == "interceptors" and "server_interceptors(" in ast.unparse(k.value)]
                found += [] if guarded else [f"{path}:{node.lineno}: {name} without server_interceptors"]
    assert not found and servers >= 2
