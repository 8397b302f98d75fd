"""The router's view of a failure is as late as `detect_s` says, in every column that a policy may read."""

from sim_fixtures import PAPER

from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.scheduling.policies import Threshold
from prfaas_jax.simulation.scenario import Outage, SimOptions
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.workloads import Poisson, Synthetic


def test_no_column_tells_of_a_failure_before_the_router_knows():
    seen = []

    class Watching(Threshold):
        def place(self, request, view, now):
            seen.append((now, float(view.prefill.load.instances[0]), bool(view.prefill.healthy[0]), float(view.decode.load.slots[0])))
            return super().place(request, view, now)

    fails = [Outage("h200", "prefill", i, 20.0, 30.0) for i in range(4)] + [Outage("pd", "decode", 0, 20.0, 30.0)]
    workload = Synthetic(Poisson(2.0), LogNormalLengths(), 64, requests=200)
    Simulation(PAPER, workload, Watching(19_400), SimOptions(detect_s=10.0), 0, lambda job: None, outages=fails).run()
    slots = PAPER.regions[0].decode * PAPER.regions[0].instance.max_batch
    lost = PAPER.regions[0].instance.max_batch
    before = [row[1:] for row in seen if row[0] < 30.0]
    between = [row[1:] for row in seen if 30.0 < row[0] < 60.0]
    after = [row[1:] for row in seen if row[0] > 60.0]
    assert len(before) > 20 and set(before) == {(4.0, True, slots)}
    assert len(between) > 20 and set(between) == {(0.0, False, slots - lost)}
    assert len(after) > 20 and set(after) == {(4.0, True, slots)}
