"""`experiments.make_certs` from the shell: what it makes, that servers can use it, and what it refuses."""

import datetime
import ipaddress
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from prfaas_jax.transfer.security import Security

ROOT = Path(__file__).parents[2]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.make_certs", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_set_is_made_printed_and_usable(tmp_path):
    out = tmp_path / "new" / "certs"
    done = run(f"--out={out}", "--hosts=prefill.example, 10.0.0.7,fd00::1", "--days=2", "--names=one,two")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"ca.crt", "token", "one.crt", "one.key", "two.crt", "two.key"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in out.iterdir()) and stat.S_IMODE(out.stat().st_mode) == 0o700
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("one", "two"):
        assert f"  {result['flags'][name]}\n" in done.stdout
        security = Security(**dict(flag.removeprefix("--").split("=", 1) for flag in result["flags"][name].split()))
        assert security.tls and security.token_file == str(out / "token")

    ca = certificate(out / "ca.crt")
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(ca=True, path_length=0)
    for path in (out / "one.crt", out / "two.crt"):
        leaf = certificate(path)
        leaf.verify_directly_issued_by(ca)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["localhost", "prefill.example"]
        assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(a) for a in ("127.0.0.1", "::1", "10.0.0.7", "fd00::1")]
        purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(purposes) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
        left = leaf.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        assert (
            datetime.timedelta(days=1, hours=23) < left <= datetime.timedelta(days=2) and leaf.not_valid_after_utc <= ca.not_valid_after_utc
        )

    secrets = [(out / "token").read_text().strip(), *(out / "one.key").read_text().splitlines()[1:-1]]
    assert not [secret for secret in secrets if secret in done.stdout + done.stderr]


def test_nothing_is_overwritten_unless_forced(tmp_path):
    assert run(f"--out={tmp_path}", "--names=one").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused = run(f"--out={tmp_path}", "--names=one,two")
    assert refused.returncode == 2 and f"out='{tmp_path}': expected a folder without ca.crt, token, one.crt, one.key;" in refused.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # A key that anybody could read, and a link that leads elsewhere: neither is written through.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / "one.key").chmod(0o644)
    (tmp_path / "token").unlink()
    (tmp_path / "token").symlink_to(elsewhere)
    assert run(f"--out={tmp_path}", "--names=one", "--force").returncode == 0
    assert elsewhere.read_text() == "mine" and not (tmp_path / "token").is_symlink()
    assert stat.S_IMODE((tmp_path / "one.key").stat().st_mode) == 0o600
    assert all((tmp_path / name).read_bytes() != content for name, content in before.items())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--days=0"], "days=0.0"),
        (["--days=4000"], "days=4000.0"),
        (["--names="], "names=''"),
        (["--names=one,one"], "names='one,one'"),
        (["--names=ca"], "names='ca'"),
        (["--names=../one"], "names='../one'"),
        (["--hosts=host:7001"], "hosts='host:7001'"),
        (["--hosts=*.example"], "hosts='*.example'"),
        (["--out=/proc/nowhere"], "out='/proc/nowhere'"),
    ],
)
def test_bad_flags_are_named_and_nothing_is_written(tmp_path, flags, named):
    done = run(f"--out={tmp_path}", *flags)
    assert done.returncode == 2 and f"error: {named}: expected" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
