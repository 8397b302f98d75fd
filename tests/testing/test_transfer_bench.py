"""The benchmark of lanes: real processes, small transfers, and the arithmetic of its figures."""

import json

import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing.overlap_bench import Measured, table
from prfaas_jax.testing.overlap_bench import draw as draw_overlap
from prfaas_jax.testing.transfer_baselines import Sample
from prfaas_jax.testing.transfer_bench import OURS, RAW, Route, draw, figures, measure

MIB = 1 << 20


def test_figures_are_medians_and_ratios_within_a_round():
    raw = [Sample(10**9, seconds, 0.1, 0.2) for seconds in (1.0, 2.0, 4.0)]
    ours = [Sample(10**9, 2 * seconds, 0.3, 0.3) for seconds in (1.0, 2.0, 4.0)]
    found = figures({OURS: ours, RAW: raw}, Route(gbps=8.0, rtt_ms=500.0))
    assert found[OURS].ratio_to_raw == 0.5
    assert found[OURS].core_s_per_gb == pytest.approx(0.6)
    assert found[OURS].gb_s == 0.25
    assert found[OURS].ratio_to_shaped == pytest.approx(1 / 3.5)


@pytest.mark.parametrize("checksum", [True, False])
def test_lanes_and_raw_sockets_take_turns(checksum):
    samples, missing = measure(Route(), 4 * MIB, 2, checksum, lanes=2, message_kib=1024)
    assert not missing
    assert {len(taken) for taken in samples.values()} == {2}
    assert all(sample.seconds > 0 for taken in samples.values() for sample in taken)


def test_over_a_relay_both_get_the_same_link():
    samples, _ = measure(Route(gbps=0.5, rtt_ms=4.0), 8 * MIB, 2, True, lanes=2, message_kib=1024)
    found = figures(samples, Route(gbps=0.5, rtt_ms=4.0))
    # Never faster than the link; how much slower is the machine's affair while it has other work.
    assert 0.05 < found[OURS].ratio_to_shaped < 1.1


def test_compressed_messages_bring_the_same_bytes():
    samples, _ = measure(Route(), 2 * MIB, 1, True, lanes=1, message_kib=512, compressed=True)
    assert OURS in samples


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(InvalidInput, match="nbytes"):
        measure(Route(), 3 * MIB, 1, True, lanes=1, message_kib=2048)


def test_results_become_pictures(tmp_path):
    fields = {"gb_s": 1.0, "core_s_per_gb": 0.5, "ratio_to_raw": 0.7, "ratio_to_shaped": None, "samples": 9}
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"cases": {"checksum": {OURS: fields, RAW: fields}}}))
    draw(summary, tmp_path / "bars.png")
    row = Measured(2048, "2x", True, 0.1, 10**6, 3.0, 2.5, 0.1, 0.01, 0.09, 0.0)
    summary.write_text(json.dumps({"requests": [vars(row)]}))
    draw_overlap(summary, tmp_path / "overlap.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000 < (tmp_path / "overlap.png").stat().st_size
    assert row.share == pytest.approx(1 / 30) and "3.3%" in table([row])
