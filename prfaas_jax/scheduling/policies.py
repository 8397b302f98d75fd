"""Rules that place a request by its lengths alone: pure decisions that explain themselves.

One policy, three drivers: the live router, the simulator and tests call `place(request, view, now)` with their own view and clock.
Policies that predict times are in `predictive`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Placement, Policy, Request, Servers


@dataclasses.dataclass(frozen=True)
class AlwaysLocal:
    """Every prompt is prefilled by its decode server."""

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Never remote."""
        return local(view, decode_row(view), "always_local")


@dataclasses.dataclass(frozen=True)
class AlwaysRemote:
    """Every prompt is prefilled remotely while a prefill server is healthy: the paper's naive heterogeneous PD."""

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Remote, or local when no prefill server is healthy."""
        return remote(view, decode_row(view), "always_remote")


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Prompts with more than `tokens` tokens to compute go remote (the paper's t; clusters judged alone: l_total - l_pd > t)."""

    tokens: int

    def __post_init__(self) -> None:
        _check_tokens("threshold.tokens", self.tokens)

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Compares what the decode side would have to compute with the threshold."""
        row = decode_row(view)
        held = request.held_by_decode(row)
        uncached = request.tokens - held
        if uncached > self.tokens:
            return remote(view, row, f"threshold: {_count(request, held)} > {self.tokens} tokens")
        return local(view, row, f"threshold: {_count(request, held)} <= {self.tokens} tokens")


@dataclasses.dataclass(frozen=True)
class Reverse:
    """The threshold rule upside down, short prompts go remote: a baseline that shows what the direction of the rule is worth."""

    tokens: int

    def __post_init__(self) -> None:
        _check_tokens("reverse.tokens", self.tokens)

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Compares what the decode side would have to compute with the threshold."""
        row = decode_row(view)
        held = request.held_by_decode(row)
        if request.tokens - held <= self.tokens:
            return remote(view, row, f"reverse: {_count(request, held)} <= {self.tokens} tokens")
        return local(view, row, f"reverse: {_count(request, held)} > {self.tokens} tokens")


@dataclasses.dataclass
class LengthBlind:
    """A share of the requests goes remote whatever their length: the honest load-balanced baseline.

    `share` of them, spread as evenly as the golden ratio's multiples are, from a start that `seed` sets.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InvalidInput("length_blind.share", self.share, "a share of the requests, 0..1")
        self._at = float(np.random.default_rng(self.seed).random())

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """The next draw decides."""
        self._at = (self._at + 0.6180339887498949) % 1.0
        row = decode_row(view)
        return (remote if self._at < self.share else local)(view, row, f"length_blind: share {self.share:.3g}")


@dataclasses.dataclass(frozen=True)
class PaperPrefix:
    """The paper's rule with prefix caches.

    Bandwidth scarce: clusters are judged alone, l_total - l_pd <= t stays local, and no cache is moved. Abundant: the longer of the two
    prefixes counts, l_total - max(l_prfaas, l_pd) <= t stays local, and where the cluster that computes holds less, the rest is copied to
    it first. The paper does not say when bandwidth is scarce; here it is while the link would need more than `scarce_s` seconds for what
    is already placed on it.
    """

    tokens: int
    scarce_s: float = 1.0

    def __post_init__(self) -> None:
        _check_tokens("paper_prefix.tokens", self.tokens)
        if not self.scarce_s >= 0:
            raise InvalidInput("paper_prefix.scarce_s", self.scarce_s, "seconds >= 0")

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Needs `view.links`; raises InvalidInput without."""
        if view.links is None:
            raise InvalidInput("view.links", None, "links: paper_prefix asks whether bandwidth is scarce")
        row, far = decode_row(view), view.prefill.least_loaded()
        l_pd = request.held_by_decode(row)
        if far is None or _drain_s(view, far, row) > self.scarce_s:
            reason = f"paper_prefix (scarce): {_count(request, l_pd)}"
            if request.tokens - l_pd <= self.tokens:
                return local(view, row, f"{reason} <= {self.tokens} tokens")
            return remote(view, row, f"{reason} > {self.tokens} tokens")
        l_prfaas = request.held_by_prefill(far)
        longest = max(l_prfaas, l_pd)
        reason = f"paper_prefix (abundant): {_count(request, longest)}"
        if request.tokens - longest <= self.tokens:
            return local(view, row, f"{reason} <= {self.tokens} tokens")._replace(copied_tokens=longest - l_pd)
        return remote(view, row, f"{reason} > {self.tokens} tokens")._replace(copied_tokens=longest - l_prfaas)


@dataclasses.dataclass(frozen=True)
class CacheHitRule:
    """Local exactly if little is left to compute, by count and by share: the static rule of conditional disaggregation."""

    tokens: int = 2048
    share: float = 0.7

    def __post_init__(self) -> None:
        _check_tokens("cache_hit_rule.tokens", self.tokens)
        if not 0 <= self.share <= 1:
            raise InvalidInput("cache_hit_rule.share", self.share, "a share of the prompt, 0..1")

    def place(self, request: Request, view: ClusterView, now: float) -> Placement:
        """Local iff uncached < tokens and uncached / prompt < share."""
        row = decode_row(view)
        uncached = request.tokens - request.held_by_decode(row)
        share = uncached / request.tokens
        stays = uncached < self.tokens and share < self.share
        return (local if stays else remote)(view, row, f"cache_hit_rule: {uncached} uncached, {share:.2f} of the prompt")


POLICIES: dict[str, Callable[..., Policy]] = {
    "always_local": AlwaysLocal,
    "always_remote": AlwaysRemote,
    "threshold": Threshold,
    "reverse": Reverse,
    "length_blind": LengthBlind,
    "paper_prefix": PaperPrefix,
    "cache_hit_rule": CacheHitRule,
}


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


def decode_row(view: ClusterView) -> int:
    """Row of the least loaded healthy decode server; raises NoDecodeServer."""
    row = view.decode.least_loaded()
    if row is None:
        raise NoDecodeServer(f"0 of {len(view.decode.names)} decode servers healthy: {', '.join(view.decode.names) or 'none known'}")
    return row


def local(view: ClusterView, row: int, reason: str) -> Placement:
    """Prefill where it is decoded, on row `row`."""
    return Placement(None, view.decode.names[row], f"{reason}{_choice('decode', view.decode, row)}")


def remote(view: ClusterView, row: int, reason: str) -> Placement:
    """Prefill on the least loaded healthy prefill server, or locally, and saying so, where there is none."""
    far = view.prefill.least_loaded()
    if far is None:
        return local(view, row, f"{reason}, but local: 0 of {len(view.prefill.names)} prefill servers healthy")
    chosen = _choice("prefill", view.prefill, far) + _choice("decode", view.decode, row)
    return Placement(view.prefill.names[far], view.decode.names[row], f"{reason}{chosen}")


def _choice(role: str, servers: Servers, row: int) -> str:
    """How the row was chosen; nothing to say when there was no choice."""
    if len(servers.names) == 1:
        return ""
    return f"; {role} {servers.names[row]}: queue {servers.queue[row]}, shortest of {np.count_nonzero(servers.healthy)} healthy"


def _count(request: Request, held: int) -> str:
    return f"{request.tokens} - {held} cached = {request.tokens - held}" if held else f"{request.tokens}"


def _drain_s(view: ClusterView, prefill: int, decode: int) -> float:
    """Seconds that the link needs for what is placed on it."""
    assert view.links is not None
    rate = view.links.bytes_per_s[prefill, decode]
    return float(view.links.pending_bytes[prefill, decode] / rate) if rate else float("inf")


def _check_tokens(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput(field, value, "an integer >= 0")
