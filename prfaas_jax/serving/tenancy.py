"""Whose request it is: how many of a tenant's run at once, and where its KV may be."""

import collections
import contextlib
from collections.abc import Iterator, Mapping

import numpy as np

from prfaas_jax.errors import Exhausted, InvalidInput
from prfaas_jax.scheduling.view import ClusterView, Placement, Servers
from prfaas_jax.serving.deployment import Tenant

# Calls for one request: of whoever comes back, the one before may not have been noticed to have ended.
_CALLS = 2
# A tenant that the deployment does not name.
ANYBODY = Tenant()


class Tenancy:
    """Quotas and residency of one router; a tenant that is not named has neither."""

    def __init__(self, tenants: Mapping[str, Tenant]):
        self._tenants = dict(tenants)
        self._running: dict[str, collections.Counter[object]] = {}  # by tenant: calls by request
        self._masked: dict[str, ClusterView] = {}
        self._masked_of: ClusterView | None = None

    def of(self, name: str) -> Tenant:
        """The tenant's limits."""
        return self._tenants.get(name, ANYBODY)

    @contextlib.contextmanager
    def running(self, name: str, request_id: str = "") -> Iterator[None]:
        """A request of the tenant runs while the block does; raises Exhausted at its quota, which leaves others alone."""
        most = self.of(name).max_running
        running, key = self._running.setdefault(name, collections.Counter()), request_id or object()
        if most is not None and key not in running and len(running) >= most:
            raise Exhausted(f"tenant {name} has {len(running)} requests running (max_running={most})")
        if most is not None and running[key] >= _CALLS:
            raise Exhausted(f"tenant {name} has {running[key]} calls for request {request_id} already")
        running[key] += 1
        try:
            yield
        finally:
            running[key] -= 1
            if not running[key]:
                del running[key]
            if not running:
                del self._running[name]

    def view(self, name: str, view: ClusterView) -> ClusterView:
        """What a policy may see for the tenant: with residency no prefill cluster, and only its regions. Columns are shared, not health."""
        regions = self.of(name).regions
        if not regions:
            return view
        if view is not self._masked_of:
            self._masked, self._masked_of = {}, view
        masked = self._masked.get(name)
        if masked is None:
            far, near = view.prefill, view.decode
            nobody = Servers(far.names, np.zeros(len(far.names), bool), far.queue, far.load)
            here = Servers(near.names, near.healthy.copy(), near.queue, near.load)
            masked = self._masked[name] = ClusterView(nobody, here, view.links)
        masked.decode.healthy[:] = [
            healthy and region in regions for healthy, region in zip(view.decode.healthy, view.decode.names, strict=True)
        ]
        return masked

    def check(self, name: str, placement: Placement) -> None:
        """Raises InvalidInput for a placement that takes a resident tenant's KV out of its regions: the policy did not look at health."""
        regions = self.of(name).regions
        if regions and (placement.prefill is not None or placement.decode not in regions):
            where = (placement.prefill, placement.decode)
            raise InvalidInput("placement", where, f"prefill and decode in a region of tenant {name}: {', '.join(regions)}")
