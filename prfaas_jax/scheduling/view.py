"""What a policy sees and says: a request, one numpy row per server or cluster, a placement with its reason.

A driver (router, simulator, test) keeps one `ClusterView` and writes into its columns as reports come in; a policy only reads.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float64, Int64

from prfaas_jax.errors import InvalidInput, PrfaasError

LONGEST = np.int64(np.iinfo(np.int64).max)


class NoDecodeServer(PrfaasError):
    """No healthy decode server: the request cannot be placed at all; maps to gRPC UNAVAILABLE."""


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """What a policy may know of a request.

    Attributes:
        tokens: prompt length l_total, at least 1.
        output_tokens: upper limit of new tokens.
        cached_prefill: longest cached prefix, in tokens, on the remote prefill side: one for all, or one per row of `view.prefill`.
        cached_decode: the same on the decode side: one for all, or one per row of `view.decode`.
    """

    tokens: int
    output_tokens: int
    cached_prefill: int | Int64[np.ndarray, " prefill"] = 0
    cached_decode: int | Int64[np.ndarray, " decode"] = 0

    def __post_init__(self) -> None:
        near, far, tokens = self.cached_decode, self.cached_prefill, self.tokens
        # One comparison where all is well: there is a request per decision.
        if tokens >= 1 <= self.output_tokens and isinstance(near, int) and isinstance(far, int) and 0 <= near <= tokens >= far >= 0:
            return
        for field in ("tokens", "output_tokens"):
            if getattr(self, field) < 1:
                raise InvalidInput(f"request.{field}", getattr(self, field), "an integer >= 1")
        for field in ("cached_prefill", "cached_decode"):
            value = getattr(self, field)
            low, high = (value, value) if isinstance(value, int) else (value.min(initial=0), value.max(initial=0))
            if low < 0 or high > tokens:
                raise InvalidInput(f"request.{field}", value, f"0..{tokens}, the prompt length")

    def held_by_prefill(self, row: int) -> int:
        """l_prfaas: the prefix, in tokens, that row `row` of `view.prefill` holds."""
        return self.cached_prefill if isinstance(self.cached_prefill, int) else int(self.cached_prefill[row])

    def held_by_decode(self, row: int) -> int:
        """l_pd: the prefix, in tokens, that row `row` of `view.decode` holds."""
        return self.cached_decode if isinstance(self.cached_decode, int) else int(self.cached_decode[row])


@dataclasses.dataclass(frozen=True)
class ServerStatus:
    """One server as its last report left it; a row of `Servers`."""

    name: str
    healthy: bool
    queue: int


@dataclasses.dataclass(frozen=True, eq=False)
class Load:
    """How busy servers are, for policies that predict; a row per server of `Servers`. Times are absolute, so rows do not age by themselves.

    The columns that are given are copied into one table, of which the attributes are rows: write into these.

    Attributes:
        instances: prefill instances that take new work; 0 where there are none (a region that decodes only).
        slots: decode slots in all.
        free_at_s: when the instance with least prefill work will have done all that it has, in seconds of the driver's clock.
        drained_at_s: when all of them would have, if the work were spread evenly.
        jobs: prompts waiting or running on the instance with least work.
        fresh: of these, prompts of which no chunk has been computed yet.
        waiting: requests whose KV is there and that wait for a decode slot or pages.
        table: all of them, in this order.
    """

    instances: Float64[np.ndarray, " servers"]
    slots: Float64[np.ndarray, " servers"]
    free_at_s: Float64[np.ndarray, " servers"]
    drained_at_s: Float64[np.ndarray, " servers"]
    jobs: Float64[np.ndarray, " servers"]
    fresh: Float64[np.ndarray, " servers"]
    waiting: Float64[np.ndarray, " servers"]
    table: Float64[np.ndarray, "7 servers"] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _stack(self, "load")

    @classmethod
    def idle(cls, servers: int) -> "Load":
        """All zeros, to be written into."""
        return cls(*np.zeros((7, servers)))


def columns_of(table: "type[Load | Links]") -> tuple[str, ...]:
    """The names of the table's rows."""
    return tuple(f.name for f in dataclasses.fields(table) if f.init)


def _stack(owner: "Load | Links", name: str) -> None:
    """Makes the owner's columns rows of its table; InvalidInput unless they have one shape."""
    fields = columns_of(type(owner))
    columns = [np.asarray(getattr(owner, field), np.float64) for field in fields]
    for field, column in zip(fields, columns, strict=True):
        if column.shape != columns[0].shape:
            raise InvalidInput(f"{name}.{field}", column.shape, f"as many entries as {fields[0]}, {columns[0].shape}")
    table = np.stack(columns)
    object.__setattr__(owner, "table", table)
    for field, row in zip(fields, table, strict=True):
        object.__setattr__(owner, field, row)


@dataclasses.dataclass(frozen=True, eq=False)
class Servers:
    """Servers or clusters of one role, a numpy row each; all columns have the same length.

    Attributes:
        names: unique addresses or labels.
        healthy: takes new work.
        queue: requests waiting or running there.
        load: None where nobody reports it; policies that predict then refuse the view.
    """

    names: tuple[str, ...]
    healthy: Bool[np.ndarray, " servers"]
    queue: Int64[np.ndarray, " servers"]
    load: Load | None = None

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise InvalidInput("servers.names", self.names, "unique names")
        columns = {"healthy": self.healthy, "queue": self.queue, **({"load": self.load.instances} if self.load is not None else {})}
        for name, column in columns.items():
            if column.shape != (len(self.names),):
                raise InvalidInput(f"servers.{name}", column.shape, f"a column of {len(self.names)} rows")

    @classmethod
    def of(cls, rows: Iterable[ServerStatus]) -> "Servers":
        """Stacks rows into columns."""
        rows = list(rows)
        return cls(tuple(r.name for r in rows), np.array([r.healthy for r in rows], bool), np.array([r.queue for r in rows], np.int64))

    def least_loaded(self) -> int | None:
        """Row of the healthy server with the shortest queue, the first at a tie; None when none is healthy."""
        if len(self.names) == 1:
            return 0 if self.healthy[0] else None
        if not self.healthy.any():
            return None
        # Several times cheaper than np.where.
        return int(np.maximum(self.queue, ~self.healthy * LONGEST).argmin())


@dataclasses.dataclass(frozen=True, eq=False)
class Links:
    """The network from every prefill row to every decode row; as with `Load`, what is given is copied, and attributes are for writing.

    Attributes:
        bytes_per_s: what the pair can move now, by the latest estimate; 0 where there is no link or it is down.
        transfer_bytes_per_s: the most that one transfer gets of it.
        rtt_s: round trip time.
        pending: requests placed on the pair whose KV has not arrived yet, those still computing included.
        pending_bytes: KV bytes of these requests that have not arrived, computed yet or not.
        table: all of them, in this order.
    """

    bytes_per_s: Float64[np.ndarray, "prefill decode"]
    transfer_bytes_per_s: Float64[np.ndarray, "prefill decode"]
    rtt_s: Float64[np.ndarray, "prefill decode"]
    pending: Float64[np.ndarray, "prefill decode"]
    pending_bytes: Float64[np.ndarray, "prefill decode"]
    table: Float64[np.ndarray, "5 prefill decode"] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _stack(self, "links")

    @classmethod
    def none(cls, prefill: int, decode: int) -> "Links":
        """No link between any two, to be written into."""
        return cls(*np.zeros((5, prefill, decode)))


@dataclasses.dataclass(frozen=True, eq=False)
class ClusterView:
    """What is known of the clusters at one moment: the remote prefill servers, the decode servers and, if known, the links between."""

    prefill: Servers
    decode: Servers
    links: Links | None = None

    def __post_init__(self) -> None:
        if self.links is not None:
            shape = (len(self.prefill.names), len(self.decode.names))
            if self.links.bytes_per_s.shape != shape:
                raise InvalidInput("links", self.links.bytes_per_s.shape, f"one entry per pair, {shape}")


class Placement(NamedTuple):
    """A decision: `prefill` is a remote server's name or None for the decode server itself; `reason` holds the numbers.

    `copied_tokens` of a prefix are first copied, over the link, from the side that holds them to the side that computes.
    """

    prefill: str | None
    decode: str
    reason: str
    copied_tokens: int = 0


class Policy(Protocol):
    """Decides for one request; deterministic in its arguments and its own state."""

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Places `request` at time `now` (seconds of the driver's clock). Raises NoDecodeServer."""
        ...
