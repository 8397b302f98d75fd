"""KV lanes against raw sockets that move the same bytes over the same path in turns, with and without checksums.

    python -m experiments.bench_transfer                                   (loopback, 512 MiB)
    python -m experiments.bench_transfer --gbps=1 --rtt_ms=80              (through a relay that shapes)
    python -m experiments.bench_transfer --others --peers_python=PATH      (mooncake and nixl from another environment, jax's own)

Sender and receiver are processes with warm connections; times are the receiver's, from its request to the last verified byte; blocks
are kept, and compared afterwards. `--tls` adds our lanes over mutual TLS with a token, whose cost is then printed. The relay ends TCP on
both sides: figures over it say nothing about packet loss or congestion control. The last line is JSON: gb_s, ratio_to_raw,
core_s_per_gb, ratio_to_shaped, the same under "no_checksum", and what else was measured under "cases".
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

MIB = flags.DEFINE_integer("mib", 512, "bytes of a transfer", lower_bound=1)
LANES = flags.DEFINE_integer("lanes", None, "connections; default: 1, and 4 over a relay", lower_bound=1, upper_bound=64)
MESSAGE_KIB = flags.DEFINE_integer("message_kib", 2048, "largest message", lower_bound=64, upper_bound=2048)
GBPS = flags.DEFINE_float("gbps", None, "rate of the relay; none: no relay, unless --rtt_ms")
RTT_MS = flags.DEFINE_float("rtt_ms", 0.0, "round trip of the relay", lower_bound=0)
CODEC = flags.DEFINE_enum("codec", "none", ["none", "zstd"], "what messages go through on the host; random bytes, as these, do not shrink")
PROCESSES = flags.DEFINE_integer(
    "processes", 0, "our lanes through so many sender and receiver processes as well", lower_bound=0, upper_bound=64
)
TLS = flags.DEFINE_bool("tls", False, "our lanes over mutual TLS with a token as well")
NO_CHECKSUM = flags.DEFINE_bool("no_checksum", False, "only without checksums; by default both")
OTHERS = flags.DEFINE_bool("others", True, "jax.experimental.transfer, mooncake, nixl as well, without checksums, where installed")
PEERS_PYTHON = flags.DEFINE_string("peers_python", None, "interpreter that has mooncake and nixl; default: this one")
ROUNDS = flags.DEFINE_integer("rounds", 9, "transfers of each", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "where to keep samples, summary and picture")


def main(argv: list[str]) -> None:
    """Measures case by case, prints a table each, writes the results."""
    del argv
    from prfaas_jax.testing import transfer_bench as bench
    from prfaas_jax.testing.certificates import CertificateOptions, make_certificates

    route, nbytes = bench.Route(GBPS.value, RTT_MS.value), MIB.value << 20
    lanes = LANES.value or (4 if route.shaped else 1)
    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    cases: dict[str, dict[str, bench.Figures]] = {}
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}

    def case(name: str, checksum: bool, security: dict[str, Any] | None = None, others: bool = False) -> None:
        samples, absent = bench.measure(
            route,
            nbytes,
            ROUNDS.value,
            checksum,
            lanes,
            MESSAGE_KIB.value,
            compressed=CODEC.value == "zstd",
            security=security,
            processes=PROCESSES.value,
            others=others,
            peers_python=PEERS_PYTHON.value,
        )
        missing.update(absent)
        cases[name] = bench.figures(samples, route)
        rows.extend({"case": name, "transport": t, **dataclasses.asdict(s)} for t, taken in samples.items() for s in taken)
        print(f"\n{name}\n{bench.table(cases[name])}", file=sys.stderr, flush=True)

    if route.shaped:
        print("the relay ends TCP on both sides: nothing here says anything about packet loss or congestion control", file=sys.stderr)
    if not NO_CHECKSUM.value:
        case("checksum", True)
    case("no checksum", False, others=OTHERS.value)
    if TLS.value:
        with tempfile.TemporaryDirectory(prefix="prfaas-") as folder:
            made = CertificateOptions(out=folder, names="sender,receiver")
            make_certificates(made)
            ends = {role: dataclasses.asdict(made.security(role)) for role in ("sender", "receiver")}
            case("TLS", not NO_CHECKSUM.value, ends)
    for name, why in missing.items():
        print(f"{name}: not measured ({why})", file=sys.stderr)
    plain = {name: dataclasses.asdict(found[bench.OURS]) for name, found in cases.items()}
    result = {
        **(plain["no checksum"] if NO_CHECKSUM.value else plain["checksum"]),
        "no_checksum": plain["no checksum"],
        **({"tls_over_plain": plain["TLS"]["gb_s"] / plain[next(iter(plain))]["gb_s"]} if TLS.value else {}),
        "cases": {name: {t: dataclasses.asdict(f) for t, f in found.items()} for name, found in cases.items()},
        "missing": missing,
    }
    if workdir:
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_requests(rows)
        workdir.write_summary(result)
        bench.draw(Path(workdir.path) / "summary.json", Path(workdir.path) / "figure.png")
    headline(result)


if __name__ == "__main__":
    run_main(main)
