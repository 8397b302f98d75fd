"""Certificates and a token for development and tests: a CA of its own, one certificate per process, signed and forgotten."""

import dataclasses
import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from prfaas_jax.errors import InvalidInput
from prfaas_jax.transfer.security import Security

LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
NAMES: Final = ("prefill", "decode", "router", "client")
CA_FILE: Final = "ca.crt"
TOKEN_FILE: Final = "token"
MAX_DAYS: Final = 3650

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")
_HOST: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")
# Clocks of other hosts may be behind.
_CLOCK_SLACK: Final = datetime.timedelta(hours=1)


@dataclasses.dataclass(frozen=True)
class CertificateOptions:
    """What to make.

    Attributes:
        out: folder to write to, made if need be; no file of these names may be there.
        hosts: DNS names and addresses under which servers are dialled, comma separated; those of this machine's loopback are added.
        days: how long the certificates are valid, from now.
        names: processes that get a certificate, comma separated.
        force: replace files that are there.
    """

    out: str
    hosts: str = ""
    days: float = 30.0
    names: str = ",".join(NAMES)
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.days <= MAX_DAYS:
            raise InvalidInput("days", self.days, f"a positive number, at most {MAX_DAYS}")
        names = split(self.names)
        if (
            not names
            or len(set(names)) != len(names)
            or not all(_NAME.fullmatch(name) for name in names)
            or {"ca", TOKEN_FILE} & set(names)
        ):
            raise InvalidInput("names", self.names, f"different names of small letters, digits, - and _, none of them ca or {TOKEN_FILE}")
        for host in split(self.hosts):
            _general_name(host)

    def security(self, name: str) -> Security:
        """What the process `name` uses, once the files are there."""
        tls_ca, tls_cert, tls_key, token_file = (str(Path(self.out) / file) for file in (CA_FILE, f"{name}.crt", f"{name}.key", TOKEN_FILE))
        return Security(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)


def split(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def make_certificates(options: CertificateOptions) -> list[Path]:
    """Writes ca.crt, NAME.crt and NAME.key for every name, and token; only their owner may read them. Returns the paths.

    The CA's key is not kept: nobody can sign with it later, and another name takes a new set. Raises InvalidInput naming files in the way.
    """
    # Never longer valid than what signs it: both count from one moment.
    now = datetime.datetime.now(datetime.UTC)
    period = now - _CLOCK_SLACK, now + datetime.timedelta(days=options.days)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _authority(ca_key, period)
    contents = {CA_FILE: ca.public_bytes(serialization.Encoding.PEM), TOKEN_FILE: secrets.token_urlsafe(32).encode() + b"\n"}
    hosts = dict.fromkeys((*LOCAL_HOSTS, *split(options.hosts)))
    for name in split(options.names):
        key = ec.generate_private_key(ec.SECP256R1())
        contents[f"{name}.crt"] = _leaf(name, key, list(hosts), ca, ca_key, period).public_bytes(serialization.Encoding.PEM)
        contents[f"{name}.key"] = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    return _write(Path(options.out), contents, options.force)


def _authority(key: ec.EllipticCurvePrivateKey, period: tuple[datetime.datetime, datetime.datetime]) -> x509.Certificate:
    # A name of its own for every set: with one name for all, a chain to another set's CA fails by its signature, which says less.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"prfaas_jax development CA {secrets.token_hex(4)}")])
    builder = _builder(name, name, key, period)
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _leaf(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    period: tuple[datetime.datetime, datetime.datetime],
) -> x509.Certificate:
    """For a server that is dialled as any of `hosts`, and for a client."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(subject, ca.subject, key, period)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(purposes, critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, period: tuple[datetime.datetime, datetime.datetime]
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return builder.serial_number(x509.random_serial_number()).not_valid_before(period[0]).not_valid_after(period[1])


def _key_usage(**allowed: bool) -> x509.KeyUsage:
    every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign")
    return x509.KeyUsage(**(dict.fromkeys((*every, "crl_sign", "encipher_only", "decipher_only"), False) | allowed))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise InvalidInput("hosts", host, "DNS names and addresses, without ports") from None
        return x509.DNSName(host)


def _write(folder: Path, contents: dict[str, bytes], force: bool) -> list[Path]:
    paths = [folder / name for name in contents]
    there = [path.name for path in paths if path.exists()]
    if there and not force:
        raise InvalidInput("out", str(folder), f"a folder without {', '.join(there)}; --force replaces them")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            # Unlinked first: a file that is there keeps its mode, and a link would lead elsewhere.
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        raise InvalidInput("out", str(folder), f"a folder that can be written to ({error.strerror})") from error
    return paths
