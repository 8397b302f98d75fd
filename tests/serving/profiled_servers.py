"""A prefill or decode server without a model, as a process: `python -m profiled_servers --role=prefill`."""

import asyncio
import dataclasses

from absl import flags
from serving_fixtures import decode_engine, prefill_engine

from experiments import dataclass_flags
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.process import run_main, serve
from prfaas_jax.transfer.security import Security

dataclass_flags.define(Security)
ROLE = flags.DEFINE_enum("role", None, ["prefill", "decode"], "which", required=True)
ADDRESS = flags.DEFINE_string("address", "127.0.0.1:0", "control plane")
TOKENS_PER_S = flags.DEFINE_float("tokens_per_s", 1e6, "pace of the prefill")
STEP_S = flags.DEFINE_float("step_s", 0.0, "seconds per decode step")
IDLE_S = flags.DEFINE_float("idle_s", 5.0, "idle timer of the decode server")


async def run(engine) -> None:
    security = dataclasses.asdict(dataclass_flags.read(Security))
    if ROLE.value == "prefill":
        server = PrefillServer(engine, PrefillServerOptions(ADDRESS.value, **security))
    else:
        server = DecodeServer(engine, None, DecodeServerOptions(ADDRESS.value, idle_s=IDLE_S.value, **security))
    await serve(server, lambda: {"address": server.address}, grace_s=10)


def main(argv: list[str]) -> None:
    engine = prefill_engine(tokens_per_s=TOKENS_PER_S.value) if ROLE.value == "prefill" else decode_engine(step_s=STEP_S.value)
    try:
        asyncio.run(run(engine))
    finally:
        engine.close()


if __name__ == "__main__":
    run_main(main)
