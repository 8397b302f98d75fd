"""Who may connect, and who may read along: every gRPC port and channel of the project is opened here.

With TLS both sides show a certificate that descends from `tls_ca`, and the client checks that the server's is for the name it dialled.
A bearer token is asked for on top, before a call's handler runs or its request is read. Files are read once, when a `Security` is made;
what is in them never appears in a repr, a message or a pickle.
"""

import dataclasses
import datetime
import functools
import hmac
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from prfaas_jax.errors import InvalidInput
from prfaas_jax.transfer.channel import Options
from prfaas_jax.transfer.endpoint import is_loopback, parse_address

MIN_TOKEN_CHARS: Final = 16
_TLS_FIELDS: Final = ("tls_ca", "tls_cert", "tls_key")
_HEADER: Final = "authorization"
# Whoever watches over a server need not be able to use it.
_OPEN_METHODS: Final = "/grpc.health.v1.Health/"
_REFUSAL: Final = "this server asks for a bearer token, and the call had none or another one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Security:
    """What a process shows to its peers, and asks of them; one certificate serves it as server and as client.

    Raises InvalidInput naming field and file: missing, not what it should be, or not matching another one.

    Attributes:
        tls_ca: PEM file with the certificates that every peer's certificate must descend from; with tls_cert and tls_key, TLS is used.
        tls_cert: PEM file with this process's own certificate, and those between it and the peers' CA.
        tls_key: PEM file with the private key of tls_cert, not encrypted.
        token_file: file with the bearer token that calls must carry, one line; without TLS it travels readably, so that takes --insecure.
        insecure: without TLS, allow addresses that others than this machine can reach, and a bearer token.
    """

    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    token_file: str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        given = [getattr(self, field) is not None for field in _TLS_FIELDS]
        if any(given) and not all(given):
            missing = _TLS_FIELDS[given.index(False)]
            raise InvalidInput(missing, None, f"a file: {', '.join(_TLS_FIELDS)} go together")
        if self.token_file is not None and not (self.tls or self.insecure):
            raise InvalidInput("token_file", self.token_file, "TLS as well: a token that is sent in the clear takes --insecure")
        _ = self._credentials, self._token  # read now

    def __reduce__(self) -> tuple[Any, ...]:
        # Paths only: a process that this is sent to reads the files itself.
        return functools.partial(type(self), **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}), ()

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted and both sides known."""
        return self.tls_ca is not None

    @functools.cached_property
    def _token(self) -> bytes | None:
        if self.token_file is None:
            return None
        lines = _read("token_file", self.token_file).removesuffix(b"\n").removesuffix(b"\r").split(b"\n")
        if len(lines) != 1 or len(lines[0]) < MIN_TOKEN_CHARS or not all(0x21 <= byte <= 0x7E for byte in lines[0]):
            expected = f"a file with one line of at least {MIN_TOKEN_CHARS} printable ASCII characters, no spaces"
            raise InvalidInput("token_file", self.token_file, expected)
        return lines[0]

    @functools.cached_property
    def _credentials(self) -> tuple[grpc.ChannelCredentials, grpc.ServerCredentials] | None:
        """For channels and for ports."""
        if self.tls_ca is None or self.tls_cert is None or self.tls_key is None:
            return None
        ca, chain, key = (_read(field, getattr(self, field)) for field in _TLS_FIELDS)
        _certificates("tls_ca", self.tls_ca, ca)
        own = _certificates("tls_cert", self.tls_cert, chain)[0]
        now = datetime.datetime.now(datetime.UTC)
        if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
            period = f"{own.not_valid_before_utc:%Y-%m-%d %H:%M} to {own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            raise InvalidInput("tls_cert", self.tls_cert, f"a certificate that is valid now; this one is from {period}")
        _check_key(self.tls_key, key, own)
        return (
            grpc.ssl_channel_credentials(ca, key, chain),
            grpc.ssl_server_credentials([(key, chain)], root_certificates=ca, require_client_auth=True),
        )


NONE: Final = Security()


def check_listen(field: str, text: str, security: Security) -> tuple[str, int]:
    """Like `parse_address` for an address to listen on: port 0 is fine, a host that others can reach only with TLS or `insecure`.

    KV can be inverted to its prompt: whoever can read the link can read the prompts.
    """
    host, port = parse_address(field, text, allow_zero=True)
    if not (security.tls or security.insecure or is_loopback(host)):
        raise InvalidInput(field, text, "a loopback address: anything wider takes TLS (--tls_ca, --tls_cert, --tls_key), or --insecure")
    return host, port


def add_port(server: Any, field: str, address: str, security: Security) -> str:
    """Adds a port to a grpc or grpc.aio server and returns "host:port" as bound, with the port that port 0 became.

    The server must have been made with `server_interceptors(security)` or `aio_server_interceptors(security)`. Raises InvalidInput naming
    `field` when the address is not to be used without TLS, or cannot be bound, e.g. because its port is in use.
    """
    host, _ = check_listen(field, address, security)
    expected = "an address of this machine whose port is free"
    try:
        if security._credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, security._credentials[1])
    except RuntimeError as error:
        raise InvalidInput(field, address, f"{expected} ({error})") from error
    if not port:
        raise InvalidInput(field, address, expected)
    return f"{host}:{port}"


def open_channel(address: str, options: Options, security: Security = NONE) -> grpc.Channel:
    """A channel whose every call carries the token; it connects on first use and reconnects by itself."""
    return _open(grpc, address, options, security)


def open_aio_channel(address: str, options: Options, security: Security = NONE) -> Any:
    """Like `open_channel`, for asyncio."""
    return _open(grpc.aio, address, options, security)


def server_interceptors(security: Security) -> tuple[grpc.ServerInterceptor, ...]:
    """What a grpc.server must be made with, so that calls without the token end as UNAUTHENTICATED before anything else happens."""
    return () if security._token is None else (_TokenCheck(security._token),)


def aio_server_interceptors(security: Security) -> tuple[Any, ...]:
    """Like `server_interceptors`, for a grpc.aio.server."""
    return () if security._token is None else (_AioTokenCheck(security._token),)


# --- the client's side -------------------------------------------------------------------------------------------------------------


def _open(library: Any, address: str, options: Options, security: Security) -> Any:
    if security._credentials is None:
        channel = library.insecure_channel(address, options=options)
    else:
        channel = library.secure_channel(address, security._credentials[0], options=options)
    return channel if security._token is None else _TokenChannel(channel, security._token)


class _TokenChannel:
    """A channel, synchronous or not, whose calls carry a token.

    Instead of gRPC's client interceptors, which put objects of their own between the caller and the call, four of them per kind of channel.
    """

    def __init__(self, channel: Any, token: bytes):
        self._channel = channel
        self._header = (_HEADER, f"Bearer {token.decode('ascii')}")

    def unary_unary(self, *args: Any, **kwargs: Any) -> "_TokenCallable":
        return _TokenCallable(self._channel.unary_unary(*args, **kwargs), self._header)

    def unary_stream(self, *args: Any, **kwargs: Any) -> "_TokenCallable":
        return _TokenCallable(self._channel.unary_stream(*args, **kwargs), self._header)

    def stream_unary(self, *args: Any, **kwargs: Any) -> "_TokenCallable":
        return _TokenCallable(self._channel.stream_unary(*args, **kwargs), self._header)

    def stream_stream(self, *args: Any, **kwargs: Any) -> "_TokenCallable":
        return _TokenCallable(self._channel.stream_stream(*args, **kwargs), self._header)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def __enter__(self) -> "_TokenChannel":
        self._channel.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._channel.__exit__(*error)

    async def __aenter__(self) -> "_TokenChannel":
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._channel.__aexit__(*error)


class _TokenCallable:
    """A method of a stub, in each form that it can be called in; it returns gRPC's own call objects."""

    def __init__(self, method: Any, header: tuple[str, str]):
        self._method, self._header = method, header

    def __call__(self, request: Any = None, timeout: float | None = None, metadata: Any = None, **kwargs: Any) -> Any:
        return self._call(self._method, request, timeout, metadata, kwargs)

    def with_call(self, request: Any, timeout: float | None = None, metadata: Any = None, **kwargs: Any) -> Any:
        return self._call(self._method.with_call, request, timeout, metadata, kwargs)

    def future(self, request: Any, timeout: float | None = None, metadata: Any = None, **kwargs: Any) -> Any:
        return self._call(self._method.future, request, timeout, metadata, kwargs)

    def _call(self, method: Any, request: Any, timeout: float | None, metadata: Any, kwargs: dict[str, Any]) -> Any:
        return method(request, timeout=timeout, metadata=(*(metadata or ()), self._header), **kwargs)


# --- the server's side -------------------------------------------------------------------------------------------------------------


def _admits(token: bytes, details: grpc.HandlerCallDetails) -> bool:
    if details.method.startswith(_OPEN_METHODS):
        return True
    shown = [value for key, value in details.invocation_metadata if key == _HEADER]
    # Bytes: compare_digest does not take text beyond ASCII, which a stranger may well send.
    return len(shown) == 1 and hmac.compare_digest(shown[0].encode(), b"Bearer " + token)


class _TokenCheck(grpc.ServerInterceptor):
    def __init__(self, token: bytes):
        self._token = token

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails) -> Any:
        return continuation(handler_call_details) if _admits(self._token, handler_call_details) else _REFUSED


class _AioTokenCheck(grpc.aio.ServerInterceptor):
    def __init__(self, token: bytes):
        self._token = token

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails) -> Any:
        return await continuation(handler_call_details) if _admits(self._token, handler_call_details) else _AIO_REFUSED


def _refuse(requests: Any, context: Any) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSAL)


async def _aio_refuse(requests: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSAL)


# Streams of requests, whatever the method takes: a handler of one request would wait for it and read it.
_REFUSED: Final = grpc.stream_stream_rpc_method_handler(_refuse)
_AIO_REFUSED: Final = grpc.stream_stream_rpc_method_handler(_aio_refuse)


# --- files -------------------------------------------------------------------------------------------------------------------------


def _read(field: str, path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(field, path, f"a readable file ({error.strerror})") from error


def _certificates(field: str, path: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        # Not chained: the parser's message may quote the file.
        raise InvalidInput(field, path, "a PEM file with certificates") from None


def _check_key(path: str, pem: bytes, certificate: x509.Certificate) -> None:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):  # TypeError: encrypted
        raise InvalidInput("tls_key", path, "a PEM file with a private key that is not encrypted") from None
    if key.public_key() != certificate.public_key():
        raise InvalidInput("tls_key", path, "the private key of tls_cert; this is another one")
