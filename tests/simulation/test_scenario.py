import itertools
import math

import numpy as np
import pytest
from sim_fixtures import PAPER, Listed

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.policies import AlwaysLocal
from prfaas_jax.simulation.scenario import Outage, SimOptions, SquareWave, Steps, random_outages
from prfaas_jax.simulation.simulator import Simulation


def test_a_square_wave_begins_high():
    changes = SquareWave(1.0, 10.0).changes(9.0)
    assert list(itertools.islice(changes, 4)) == [(5.0, 1.0), (10.0, 9.0), (15.0, 1.0), (20.0, 9.0)]


def test_random_outages_have_their_means_and_do_not_overlap():
    targets = [("a", "prefill", 0), ("x", "decode", 1)]
    fails = random_outages(targets, 100.0, 10.0, 1e5, np.random.default_rng(0))
    assert [f.start_s for f in fails] == sorted(f.start_s for f in fails) and fails[-1].start_s < 1e5
    assert np.mean([f.seconds for f in fails]) == pytest.approx(10.0, rel=0.1)
    for target in targets:
        ours = [f for f in fails if (f.cluster, f.part, f.index) == target]
        assert len(ours) == pytest.approx(1e5 / 110.0, rel=0.1)
        assert all(a.start_s + a.seconds < b.start_s for a, b in itertools.pairwise(ours))
    assert fails == random_outages(targets, 100.0, 10.0, 1e5, np.random.default_rng(0))


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: SquareWave(-1.0, 1.0), "square_wave.low"),
        (lambda: SquareWave(math.inf, 1.0), "square_wave.low"),
        (lambda: SquareWave(1.0, 0.0), "square_wave.period_s"),
        (lambda: SquareWave(1.0, math.inf), "square_wave.period_s"),
        (lambda: Steps(((2.0, 1.0), (1.0, 1.0))), "steps"),
        (lambda: Steps(((1.0, 1.0), (1.0, 2.0))), "steps"),
        (lambda: Steps(((-1.0, 1.0),)), "steps"),
        (lambda: Steps(((math.nan, 1.0),)), "steps"),
        (lambda: Steps(((1.0, -1.0),)), "steps"),
        (lambda: Steps(((1.0, math.inf),)), "steps"),
        (lambda: Outage("a", "both", 0, 1.0, 1.0), "outage.part"),
        (lambda: Outage("a", "prefill", 0, -1.0, 1.0), "outage"),
        (lambda: Outage("a", "prefill", 0, math.inf, 1.0), "outage"),
        (lambda: Outage("a", "prefill", 0, 1.0, 0.0), "outage"),
        (lambda: random_outages([], 0.0, 1.0, 1.0, RNG), "mtbf_s"),
        (lambda: random_outages([], 1.0, -1.0, 1.0, RNG), "mttr_s"),
        (lambda: random_outages([], 1.0, 1.0, math.inf, RNG), "until_s"),
        *((lambda o=o: Simulation(PAPER, Listed(()), AlwaysLocal(), SimOptions(), 0, print, outages=[o]), "outage") for o in (
            Outage("moon", "decode", 0, 1.0, 1.0), Outage("pd", "decode", 5, 1.0, 1.0), Outage("pd", "decode", -1, 1.0, 1.0),
            Outage("h200", "decode", 0, 1.0, 1.0),
        )),
        *((lambda f=f, v=v: SimOptions(**{f: v}), f) for f, v in (
            ("prefill_chunk", 65), ("prefill_chunk", 0), ("prefill_rows", 0), ("checkpoint_blocks", 0), ("prefill_cache_bytes", -1.0),
            ("decode_cache_bytes", math.nan), ("stall_s", 0.0), ("detect_s", -1.0), ("detect_s", math.inf), ("convert_s", -1.0),
            ("control_s", 0.0), ("slo_scale", 0.0), ("slo_base_s", -0.1), ("slo_tpot_s", 0.0), ("warmup", 1.0), ("warmup", -0.1),
        )),
    ],
)  # fmt: skip
def test_bad_input_names_the_field(call, field):
    with pytest.raises(InvalidInput) as caught:
        call()
    assert caught.value.field == field
