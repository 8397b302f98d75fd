"""A cluster without a model, as one process: many instances with the times of a profile, real KV bytes, real servers. No jax.

    python -m experiments.serve_profiled --profile=h20_paper_1t --model=paper_1t --prefill=3 --decode=5 --byte_scale=1e-3
    python -m experiments.serve_profiled --tokens_per_s=2000 --model=random:smollm2_135m --fingerprint=...

Prints `READY {"prefill": {"address", "lane_addresses"}, "decode": {"address"} or null, "byte_scale", "fingerprint"}` once it serves; the
byte scale is the one that whole bytes allow. SIGTERM drains it, and its last line is JSON: max_late_s and mean_late_s say how late, in
wall seconds, the process was with what its instances did. Every process of a cluster takes the same model and scales.
"""

import asyncio

from absl import flags

from experiments import dataclass_flags
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.source import read_config
from prfaas_jax.results import headline
from prfaas_jax.scheduling.profiles import FittedPrefill, Instance
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.pd_server import ServerPair
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.process import run_main, serve
from prfaas_jax.testing.profiled_cluster import ProfiledCluster
from prfaas_jax.testing.scaled_spec import scaled_spec

dataclass_flags.define(PrefillServerOptions)
dataclass_flags.define(DecodeServerOptions, "decode_")
flags.adopt_module_key_flags(dataclass_flags)
MODEL = flags.DEFINE_string("model", None, "what is played: a model config's name, or a checkpoint as an engine takes it", required=True)
DTYPE = flags.DEFINE_string("dtype", None, "of its cache; default: the model's")
FINGERPRINT = flags.DEFINE_string("fingerprint", None, "of the model that is played; default: its name, for clusters without any model")
PROFILE = flags.DEFINE_string("profile", None, "times of one instance: a name under configs/profiles, or a file")
EFFICIENCY = flags.DEFINE_float("efficiency", None, "share of the roofline, for profiles that were compiled and never run")
TOKENS_PER_S = flags.DEFINE_float("tokens_per_s", None, "instead of a profile: the pace of a prefill-only instance", lower_bound=1e-9)
PREFILL = flags.DEFINE_integer("prefill", 1, "instances that begin with prompts", lower_bound=0)
DECODE = flags.DEFINE_integer("decode", 0, "instances that begin with decoding", lower_bound=0)
CHUNK = flags.DEFINE_integer("chunk", 256, "tokens per prefill step, a multiple of 64", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 1, "prompts per prefill step", lower_bound=1)
TIME_SCALE = flags.DEFINE_float("time_scale", 1.0, "seconds of the profile per wall second", lower_bound=1e-9)
BYTE_SCALE = flags.DEFINE_float("byte_scale", 1.0, "bytes that move per byte of the model's cache", lower_bound=1e-9, upper_bound=1.0)
TOKEN_SCALE = flags.DEFINE_integer("token_scale", 1, "tokens of the model that one new token stands for", lower_bound=1)
CONVERT_S = flags.DEFINE_float("convert_s", 0.0, "seconds of the profile that an instance takes to change its role", lower_bound=0)
MAX_QUEUE = flags.DEFINE_integer("max_queue", 1024, "requests that wait in each engine before more are refused", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the KV bytes")
VERIFY = flags.DEFINE_boolean("verify", False, "compare every KV byte that arrives, too")
GRACE_S = flags.DEFINE_float("grace_s", 5.0, "seconds that running requests get after SIGTERM", lower_bound=0)


def main(argv: list[str]) -> None:
    """Serves until a signal."""
    del argv
    prefill_options = dataclass_flags.read(PrefillServerOptions)
    decode_options = dataclass_flags.read(DecodeServerOptions, "decode_")
    config = _model()
    spec, byte_scale = scaled_spec(cache_spec(config), BYTE_SCALE.value)
    cluster = ProfiledCluster(
        _instance(),
        spec,
        FINGERPRINT.value or f"profiled {config.name}",
        prefill=PREFILL.value,
        decode=DECODE.value,
        chunk=CHUNK.value,
        rows=ROWS.value,
        time_scale=TIME_SCALE.value,
        token_scale=TOKEN_SCALE.value,
        byte_scale=byte_scale,
        convert_s=CONVERT_S.value,
        vocab_size=config.vocab_size,
        max_queue=MAX_QUEUE.value,
        seed=SEED.value,
        verify=VERIFY.value,
    )
    try:
        engine = cluster.decode_engine
        decode = None if engine is None else DecodeServer(engine, None, decode_options, convert=cluster.convert)
        servers = ServerPair(PrefillServer(cluster.prefill_engine, prefill_options), decode)
        asyncio.run(serve(servers, lambda: {**servers.describe(), "byte_scale": byte_scale}, GRACE_S.value))
    finally:
        cluster.close()
    headline({"max_late_s": cluster.kernel.max_late_s, "mean_late_s": cluster.kernel.mean_late_s})


def _model() -> ModelConfig:
    from configs.models import available_models, load_model_config

    name = MODEL.value
    return read_config(f"random:{name}" if name in available_models() else name, DTYPE.value, load_model_config)


def _instance() -> Instance:
    from configs.profiles import load_profile

    profile, tokens_per_s = PROFILE.value, TOKENS_PER_S.value
    if profile is not None and tokens_per_s is None:
        return load_profile(profile, **({} if EFFICIENCY.value is None else {"efficiency": EFFICIENCY.value}))
    if profile is None and tokens_per_s is not None:
        return Instance("constant pace", FittedPrefill(0.0, 1e4 / tokens_per_s, max_tokens=1 << 20))
    raise InvalidInput("profile", profile, "either a profile or tokens_per_s")


if __name__ == "__main__":
    run_main(main)
