"""The picture of a request: what becomes a bar, what a link carried, and that a file of it can be drawn."""

import json

import numpy as np
import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.timeline import Bar, bars, draw, rates


def span(name, start, end):
    return {"name": name, "start_s": start, "end_s": end}


def test_chunks_share_a_row_and_keep_their_ranges():
    found = bars([span("queue", 0, 0.1), span("prefill 0-256", 0.1, 0.5), span("prefill 256-300", 0.5, 0.6), span("transfer", 0.5, 0.7)])
    assert found == [
        Bar("queue", 0.0, 0.1, ""),
        Bar("prefill", 0.1, 0.5, "0-256"),
        Bar("prefill", 0.5, 0.6, "256-300"),
        Bar("transfer", 0.5, 0.7, ""),
    ]


def test_a_span_that_ends_before_it_starts_is_refused():
    with pytest.raises(InvalidInput, match="span admit"):
        bars([span("admit", 2.0, 1.0)])


def test_rates_conserve_bytes_and_stay_flat_while_nothing_flows():
    start, rate = rates([(1.0, 0), (1.1, 1000), (1.5, 1000), (1.6, 3000)], bin_s=0.1)
    assert np.sum(rate * 0.1 / 8) == pytest.approx(3000)
    np.testing.assert_allclose(rate[:5], [80_000, 0, 0, 0, 0], atol=1e-3)
    assert start[0] == 1.0
    assert rates([(1.0, 5)], bin_s=0.1)[1].size == 0


def test_a_result_file_becomes_a_picture(tmp_path):
    spans = [span("queue", 0, 0.1), span("prefill 0-256", 0.1, 0.9), span("transfer", 0.5, 1.0), span("something new", 1.0, 1.1)]
    common = {"prompt_tokens": 256, "ttft_s": 1.2, "route_s": 0.01, "spans": spans}
    remote = {"name": "b", "placement": "remote", "link": [[0.5, 0], [1.0, 10**6]], **common}
    requests = [{"name": "a", "placement": "local", **common}, remote]
    (tmp_path / "timeline.json").write_text(json.dumps({"requests": requests}))
    draw(tmp_path / "timeline.json", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
