"""The router: takes Generate calls, decides where each prompt is prefilled, forwards to a decode server.

    python -m experiments.serve_router --decode=127.0.0.1:7002 --prefill=127.0.0.1:7001 --policy=threshold --threshold_tokens=512
    python -m experiments.serve_router --config=configs/clusters/two_sites_cpu.py --servers=servers.json

The second form takes a whole deployment: its clusters, links, policy and controller, tenants and roll-out; `experiments.run_cluster` starts
it, and the servers, and writes the file with their addresses. Servers may also come and go at run time (Fleet in fleet.proto).

Prints `READY {"address", "metrics_address", "policy"}` once it serves. Other than loopback addresses take TLS (--tls_ca, --tls_cert,
--tls_key), or --insecure.
"""

import asyncio
import dataclasses
import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import dataclass_flags
from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.policies import make_policy
from prfaas_jax.serving.deployment import read_servers
from prfaas_jax.serving.process import run_main, serve
from prfaas_jax.serving.router import Router, RouterOptions
from prfaas_jax.serving.text import TextCodec

dataclass_flags.define(RouterOptions)
flags.adopt_module_key_flags(dataclass_flags)
POLICY = flags.DEFINE_enum("policy", "threshold", ["always_local", "always_remote", "threshold"], "who decides where a prompt is prefilled")
THRESHOLD_TOKENS = flags.DEFINE_integer("threshold_tokens", 512, "policy threshold: longer prompts go remote", lower_bound=0)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "directory or GGUF file with the tokenizer; without it prompts must be token ids")
GRACE_S = flags.DEFINE_float("grace_s", 10.0, "seconds that running requests get after SIGTERM", lower_bound=0)
CONFIG = config_flags.DEFINE_config_file("config", None, "a deployment; its policy counts, not --policy", lock_config=True)
DEPLOYMENT = flags.DEFINE_string("deployment", None, "the same as a JSON file, as experiments.run_cluster writes it")
SERVERS = flags.DEFINE_string("servers", None, "JSON file of a deployment's servers, instead of --decode and --prefill")


def main(argv: list[str]) -> None:
    """Flags to options, a policy and a tokenizer, and those to the router."""
    del argv
    options = dataclass_flags.read(RouterOptions)
    given = [name for name in ("config", "deployment") if flags.FLAGS[name].value is not None]
    if len(given) > 1 or bool(given) != (SERVERS.value is not None):
        raise InvalidInput("servers", SERVERS.value, "given with one of --config and --deployment, or none of the three")
    # Made inside the loop: it belongs to what the router waits on.
    asyncio.run(_serve_deployment(options) if given else _serve_policy(options))


async def _serve_policy(options: RouterOptions) -> None:
    params = {"tokens": THRESHOLD_TOKENS.value} if POLICY.value == "threshold" else {}
    await _serve(Router(make_policy(POLICY.value, **params), _tokenizer(TOKENIZER.value), options), POLICY.value)


async def _serve_deployment(options: RouterOptions) -> None:
    from configs.clusters import load_deployment

    assert SERVERS.value is not None  # main
    deployment = load_deployment(CONFIG.value if DEPLOYMENT.value is None else _read_json(DEPLOYMENT.value))
    policy, controller = deployment.build_policy(deployment.policy, deployment.parameter)
    # What the file says, and flags that were given say better.
    metrics = {"metrics_address": "127.0.0.1:0"} if deployment.metrics else {}
    told = dataclasses.asdict(deployment.security) | metrics | dict(deployment.router)
    options = dataclasses.replace(options, **{name: value for name, value in told.items() if not flags.FLAGS[name].present})
    tokenizer, servers = _tokenizer(TOKENIZER.value or deployment.tokenizer), read_servers(SERVERS.value)
    await _serve(Router(policy, tokenizer, options, servers, deployment, controller), deployment.policy)


def _read_json(path: str) -> ConfigDict:
    try:
        return ConfigDict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InvalidInput("deployment", path, f"a readable JSON file ({error})") from error


def _tokenizer(path: str | None) -> TextCodec | None:
    if path is None:
        return None
    # Only here: it needs the optional `tokenizers` package.
    from prfaas_jax.models.tokenizer import Tokenizer

    return Tokenizer.load(path)


async def _serve(router: Router, policy: str) -> None:
    await serve(router, lambda: {**router.addresses, "policy": policy}, GRACE_S.value)


if __name__ == "__main__":
    run_main(main)
