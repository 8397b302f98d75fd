"""A prefill server without a model, as a process: real KV bytes at a set pace, so that only the transfer costs something.

    python -m experiments.serve_profiled --checkpoint=random:smollm2_135m --fingerprint=... --tokens_per_s=2000
"""

import asyncio

from absl import flags

from experiments import dataclass_flags
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.source import read_config
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.process import run_main, serve
from prfaas_jax.testing.profiled import ProfiledPrefillEngine

dataclass_flags.define(PrefillServerOptions)
flags.adopt_module_key_flags(dataclass_flags)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "the model that is played, as an engine takes it", required=True)
DTYPE = flags.DEFINE_string("dtype", None, "of its cache; default: the checkpoint's")
FINGERPRINT = flags.DEFINE_string("fingerprint", None, "of the model that is played", required=True)
TOKENS_PER_S = flags.DEFINE_float("tokens_per_s", 2000, "pace of the prefill", lower_bound=1e-9)
CHUNK = flags.DEFINE_integer("chunk", 256, "tokens per step", lower_bound=1)


def main(argv: list[str]) -> None:
    """Serves until a signal."""
    del argv
    options = dataclass_flags.read(PrefillServerOptions)
    from configs.models import load_model_config

    config = read_config(CHECKPOINT.value, DTYPE.value, load_model_config)
    engine = ProfiledPrefillEngine(
        cache_spec(config), FINGERPRINT.value, chunk=CHUNK.value, tokens_per_s=TOKENS_PER_S.value, vocab_size=config.vocab_size
    )
    try:
        asyncio.run(_serve(PrefillServer(engine, options)))
    finally:
        engine.close()


async def _serve(server: PrefillServer) -> None:
    await serve(server, lambda: {"address": server.address}, grace_s=5)


if __name__ == "__main__":
    run_main(main)
