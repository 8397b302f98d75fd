"""The tables that people read."""

import pytest

from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.serving.report import tokens_per_s, usage_dict, usages_table

PARTS = generation_pb2.TtftParts(route=0.01, queue=0.02, prefill=0.5, exposed_transfer=0.1, admit=0.003, first_step=0.007)
REMOTE = generation_pb2.Usage(
    placement="remote",
    reason="threshold: 1998 > 512 tokens",
    prompt_tokens=1998,
    output_tokens=4,
    finish_reason="stop",
    kv_bytes_moved=92_067_840,
    kv_bytes_expected=92_067_840,
    parts=PARTS,
    ttft_s=0.64,
    itl_s=[0.1, 0.1, 0.2],
)
ONE_TOKEN = generation_pb2.Usage(placement="local", prompt_tokens=3, output_tokens=1, finish_reason="length", ttft_s=0.1)


def test_requests_stand_side_by_side_with_their_figures():
    lines = usages_table({"first": REMOTE, "second": ONE_TOKEN}).splitlines()
    at = lines[0].index("second")
    rows = {line[: lines[0].index("first")].strip(): (line[:at].split(maxsplit=1), line[at:]) for line in lines[1:]}
    assert "92.068 of 92.068 MB" in rows["KV moved"][0][1]
    assert [float(rows[part][0][-1].split()[-2]) for part in ("route", "queue", "prefill", "admit")] == [10, 20, 500, 3]
    assert "640.0 ms" in rows["TTFT"][0][1] and "100.0 ms" in rows["TTFT"][1]
    assert rows["placement"][1] == "local"
    assert rows["tokens/s"][1] == rows["ITL p50 / p99"][1] == "one token only"


def test_numbers_are_numbers():
    fields = usage_dict(REMOTE)
    assert all(isinstance(fields[name], int) for name in fields if name.startswith("kv_bytes_")) and fields["itl_p50_s"] == 0.1


def test_decoding_rate_leaves_the_first_token_out():
    assert tokens_per_s(REMOTE) == pytest.approx(3 / 0.4)
    assert tokens_per_s(ONE_TOKEN) is None
