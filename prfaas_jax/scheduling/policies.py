"""Where a request is prefilled and decoded: pure decisions that explain themselves.

One policy, three drivers: the live router, the simulator and tests call `place(request, view, now)` with their own view and clock.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int64

from prfaas_jax.errors import InvalidInput, PrfaasError


class NoDecodeServer(PrfaasError):
    """No healthy decode server: the request cannot be placed at all; maps to gRPC UNAVAILABLE."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a policy may know of a request.

    Attributes:
        tokens: prompt length, at least 1.
        output_tokens: upper limit of new tokens.
        cached_prefill: longest cached prefix, in tokens, on the remote prefill side.
        cached_decode: longest cached prefix, in tokens, on the decode side.
    """

    tokens: int
    output_tokens: int
    cached_prefill: int = 0
    cached_decode: int = 0

    def __post_init__(self) -> None:
        for field in ("tokens", "output_tokens"):
            if getattr(self, field) < 1:
                raise InvalidInput(f"request.{field}", getattr(self, field), "an integer >= 1")
        for field in ("cached_prefill", "cached_decode"):
            if not 0 <= getattr(self, field) <= self.tokens:
                raise InvalidInput(f"request.{field}", getattr(self, field), f"0..{self.tokens}, the prompt length")


@dataclasses.dataclass(frozen=True)
class ServerStatus:
    """One server as its last report left it; a row of `Servers`."""

    name: str
    healthy: bool
    queue: int


@dataclasses.dataclass(frozen=True, eq=False)
class Servers:
    """Servers of one role, a numpy row each; all columns have the same length.

    Attributes:
        names: unique addresses or labels.
        healthy: takes new work.
        queue: requests waiting or running there.
    """

    names: tuple[str, ...]
    healthy: Bool[np.ndarray, " servers"]
    queue: Int64[np.ndarray, " servers"]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise InvalidInput("servers.names", self.names, "unique names")
        for field in dataclasses.fields(self)[1:]:
            column = getattr(self, field.name)
            if column.shape != (len(self.names),):
                raise InvalidInput(f"servers.{field.name}", column.shape, f"a column of {len(self.names)} rows")

    @classmethod
    def of(cls, rows: Iterable[ServerStatus]) -> "Servers":
        """Stacks rows into columns."""
        rows = list(rows)
        return cls(tuple(r.name for r in rows), np.array([r.healthy for r in rows], bool), np.array([r.queue for r in rows], np.int64))

    def least_loaded(self) -> int | None:
        """Row of the healthy server with the shortest queue, the first at a tie; None when none is healthy."""
        if not self.healthy.any():
            return None
        return int(np.argmin(np.where(self.healthy, self.queue, np.iinfo(np.int64).max)))


@dataclasses.dataclass(frozen=True)
class ClusterView:
    """What is known of the clusters at one moment: the remote prefill servers and the decode servers."""

    prefill: Servers
    decode: Servers


@dataclasses.dataclass(frozen=True)
class Placement:
    """A decision: `prefill` is a remote server's name or None for the decode server itself; `reason` holds the numbers."""

    prefill: str | None
    decode: str
    reason: str


class Policy(Protocol):
    """Decides for one request; deterministic in its arguments and its own state."""

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Places `request` at time `now` (seconds of the driver's clock). Raises NoDecodeServer."""
        ...


@dataclasses.dataclass(frozen=True)
class AlwaysLocal:
    """Every prompt is prefilled by its decode server."""

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Never remote."""
        return _local(view, "always_local")


@dataclasses.dataclass(frozen=True)
class AlwaysRemote:
    """Every prompt is prefilled remotely while a prefill server is healthy."""

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Remote, or local when no prefill server is healthy."""
        return _remote(view, "always_remote")


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Prompts with more than `tokens` tokens to compute go remote (the paper's t; clusters judged alone: l_total - l_pd > t)."""

    tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 0:
            raise InvalidInput("threshold.tokens", self.tokens, "an integer >= 0")

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Compares what the decode side would have to compute with the threshold."""
        uncached = request.tokens - request.cached_decode
        count = f"{request.tokens} - {request.cached_decode} cached = {uncached}" if request.cached_decode else f"{uncached}"
        if uncached > self.tokens:
            return _remote(view, f"threshold: {count} > {self.tokens} tokens")
        return _local(view, f"threshold: {count} <= {self.tokens} tokens")


POLICIES: dict[str, Callable[..., Policy]] = {"always_local": AlwaysLocal, "always_remote": AlwaysRemote, "threshold": Threshold}


def make_policy(name: str, **params: object) -> Policy:
    """Builds a policy by name, e.g. `make_policy("threshold", tokens=512)`.

    Raises:
        InvalidInput: unknown name, or parameters that the policy does not take or needs.
    """
    if name not in POLICIES:
        raise InvalidInput("policy", name, f"one of {', '.join(sorted(POLICIES))}")
    try:
        return POLICIES[name](**params)
    except TypeError as error:
        raise InvalidInput(f"policy {name} parameters", params, f"what the policy takes ({error})") from error


def _local(view: ClusterView, reason: str) -> Placement:
    decode, load = _decode(view)
    return Placement(None, decode, f"{reason}{load}")


def _remote(view: ClusterView, reason: str) -> Placement:
    row = view.prefill.least_loaded()
    if row is None:
        return _local(view, f"{reason}, but local: 0 of {len(view.prefill.names)} prefill servers healthy")
    decode, load = _decode(view)
    return Placement(view.prefill.names[row], decode, f"{reason}{_choice('prefill', view.prefill, row)}{load}")


def _decode(view: ClusterView) -> tuple[str, str]:
    row = view.decode.least_loaded()
    if row is None:
        raise NoDecodeServer(f"0 of {len(view.decode.names)} decode servers healthy: {', '.join(view.decode.names) or 'none known'}")
    return view.decode.names[row], _choice("decode", view.decode, row)


def _choice(role: str, servers: Servers, row: int) -> str:
    """How the row was chosen; nothing to say when there was no choice."""
    if len(servers.names) == 1:
        return ""
    return f"; {role} {servers.names[row]}: queue {servers.queue[row]}, shortest of {np.count_nonzero(servers.healthy)} healthy"
