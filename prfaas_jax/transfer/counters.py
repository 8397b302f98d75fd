"""The four counters that keep a disaggregated run honest."""

import dataclasses

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.spec import CacheSpec


@dataclasses.dataclass(frozen=True)
class Counters:
    """What it took to bring one request's cache over.

    Attributes:
        moved: canonical payload bytes, each counted when first seen.
        skipped: canonical bytes that did not have to move, the receiver held them already.
        resent: payload bytes that had to be sent again, as they travel.
        recomputed_tokens: prompt tokens prefilled a second time.
        wire: payload bytes that arrived over the link, first and again, as they travel: fewer than moved where a codec or compression
            saves some. What was lost on the way is not counted.
    """

    moved: int = 0
    skipped: int = 0
    resent: int = 0
    recomputed_tokens: int = 0
    wire: int = 0

    def check(self, spec: CacheSpec, length: int) -> None:
        """Raises TransferError unless every canonical byte is accounted for and nothing was recomputed."""
        expected = spec.bytes(length)
        if self.moved + self.skipped != expected:
            raise TransferError(f"moved {self.moved} + skipped {self.skipped} bytes, but {length} tokens have {expected}")
        if self.recomputed_tokens:
            raise TransferError(f"{self.recomputed_tokens} prompt tokens were prefilled again")
