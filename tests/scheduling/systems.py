"""The paper's case study and small random systems, for the tests of the throughput model, the planner and the program."""

import numpy as np
from hypothesis import strategies as st

from configs.studies import case_study, mix_of
from configs.studies.paper_case import get_config
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill, Instance
from prfaas_jax.scheduling.throughput import CaseStudy

PAPER = case_study(get_config())
PAPER_MIX = mix_of(get_config())


@st.composite
def mixes(draw: st.DrawFn, rows: int = 12, cached: bool = True) -> Mix:
    """At most as many rows as the linear program keeps, so that it is exact."""
    n = draw(st.integers(1, rows))

    def column(low: int, high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    tokens = column(64, 100_000)
    held = [(tokens * column(0, 90) // 100) if cached else 0 for _ in range(2)]
    return Mix.of(tokens, column(1, 2000), column(1, 9), *held)


@st.composite
def instances(draw: st.DrawFn, name: str) -> Instance:
    """Any hardware; memory and host links bind now and then."""
    prefill = FittedPrefill(draw(st.floats(0.01, 1)), draw(st.floats(0.1, 3)), draw(st.floats(0, 0.1)))
    decode = FittedDecode(draw(st.floats(0.005, 0.05)), draw(st.floats(0, 0.001)), draw(st.floats(0, 1e-7)))
    memory = draw(st.sampled_from([float("inf"), 2e10, 2e11]))
    nic = draw(st.sampled_from([float("inf"), 1e8, 1e9]))
    return Instance(name, prefill, decode, draw(st.integers(1, 64)), memory, nic)


@st.composite
def cases(draw: st.DrawFn) -> CaseStudy:
    """One PrfaaS cluster and one PD cluster."""
    kv = KvFootprint(draw(st.integers(0, 10**8)), draw(st.integers(1, 10**5)), ((128, draw(st.integers(0, 10**5))),))
    link = draw(st.floats(1e7, 1e10))
    return CaseStudy(kv, draw(instances("far")), draw(instances("near")), draw(st.integers(1, 5)), draw(st.integers(2, 6)), link, 1e11)
