"""Certificates and a token for development: a CA, one certificate and key per process, and the flags that use them.

    python -m experiments.make_certs --out=certs [--hosts=prefill.example,10.0.0.7] [--days=30] [--names=prefill,decode,router,client]

Every certificate is good for servers and clients, for localhost, 127.0.0.1, ::1 and --hosts. Copy to each host ca.crt, token, and the two
files of its own process. The CA's key is not kept: another name takes a new set. The last line of stdout is JSON.
"""

from pathlib import Path

from experiments import dataclass_flags
from prfaas_jax.results import headline
from prfaas_jax.serving.process import run_main
from prfaas_jax.testing.certificates import CA_FILE, LOCAL_HOSTS, TOKEN_FILE, CertificateOptions, make_certificates, split

dataclass_flags.define(CertificateOptions)


def main(argv: list[str]) -> None:
    """Makes the files and says how to use them."""
    del argv
    options = dataclass_flags.read(CertificateOptions)
    for path in make_certificates(options):
        print(path)
    out = Path(options.out)
    flags = {
        name: f"--tls_ca={out / CA_FILE} --tls_cert={out / f'{name}.crt'} --tls_key={out / f'{name}.key'} --token_file={out / TOKEN_FILE}"
        for name in split(options.names)
    }
    for name, text in flags.items():
        print(f"\nflags of {name}:\n  {text}")
    headline({"out": options.out, "days": options.days, "hosts": [*LOCAL_HOSTS, *split(options.hosts)], "flags": flags})


if __name__ == "__main__":
    run_main(main)
