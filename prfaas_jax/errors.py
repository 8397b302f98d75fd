"""Errors that cross package borders; every message names the field, the value seen and what would be right."""


class PrfaasError(Exception):
    """Base of all errors that this package raises on purpose."""


class InvalidInput(PrfaasError, ValueError):
    """Input that can never succeed as given; maps to gRPC INVALID_ARGUMENT."""

    def __init__(self, field: str, value: object, expected: str):
        super().__init__(f"{field}={value!r}: expected {expected}")
        self.field, self.value, self.expected = field, value, expected

    def __reduce__(self) -> tuple[type["InvalidInput"], tuple[str, object, str]]:
        # By default it would be made again from its message alone, and break the pool of processes that it is sent through.
        return type(self), (self.field, self.value, self.expected)


class Exhausted(PrfaasError):
    """A bounded resource (queue, pages, staging) is full right now; maps to gRPC RESOURCE_EXHAUSTED."""


class PeerMismatch(PrfaasError):
    """The two sides disagree on model, dtype, layout or protocol; maps to gRPC FAILED_PRECONDITION."""

    def __init__(self, field: str, ours: object, theirs: object):
        super().__init__(f"{field} differs: ours {ours!r}, theirs {theirs!r}")
        self.field, self.ours, self.theirs = field, ours, theirs

    def __reduce__(self) -> tuple[type["PeerMismatch"], tuple[str, object, object]]:
        return type(self), (self.field, self.ours, self.theirs)


class TransferError(PrfaasError):
    """KV bytes could not be moved or verified: checksum, gap, stale epoch, idle peer, closed lane."""


class EngineFailed(PrfaasError):
    """A jitted step raised; the requests in that step failed, or the engine is no longer running."""
