"""Two tenants on one system, one of which asks for far more than its quota: what the other one notices."""

import dataclasses
from typing import Any

import numpy as np

from prfaas_jax.serving.deployment import Deployment, Tenant
from prfaas_jax.testing.replay_script import Ask, Row

POLITE, GREEDY = "polite", "greedy"


def with_quota(deployment: Deployment, max_running: int) -> Deployment:
    """The deployment with a quota for the greedy tenant."""
    tenants = {**deployment.tenants, GREEDY: Tenant(max_running)}
    config = {**deployment.config, "tenants": {**deployment.config.get("tenants", {}), GREEDY: {"max_running": max_running, "regions": ()}}}
    return dataclasses.replace(deployment, tenants=tenants, config=config)


def merged(*streams: tuple[Ask, ...]) -> tuple[Ask, ...]:
    """Requests of several scripts in one, by time, with numbers of their own."""
    asks = sorted((ask for stream in streams for ask in stream), key=lambda ask: ask.time_s)
    return tuple(Ask(i, a.time_s, a.tokens, a.new_tokens, a.blocks, a.tenant) for i, a in enumerate(asks))


def of(rows: list[Row], tenant: str) -> dict[str, Any]:
    """What became of a tenant's requests: how many were asked, done and refused, and percentiles of TTFT in model seconds."""
    mine = [row for row in rows if row.tenant == tenant]
    done = [row.ttft_s for row in mine if row.done]
    refused = sum(row.error == "RESOURCE_EXHAUSTED" for row in mine)
    other = len(mine) - len(done) - refused
    p50, p90 = np.percentile(done, (50, 90)).tolist() if done else (None, None)
    return {"asked": len(mine), "done": len(done), "refused": refused, "failed": other, "ttft_p50_s": p50, "ttft_p90_s": p90}
