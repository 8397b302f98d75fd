"""configs/studies: what a study's fields become, and which of them are refused."""

import dataclasses
import math

import pytest

from configs.studies import case_study, lengths_of, mix_of
from configs.studies.paper_case import get_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.topology import GBPS
from prfaas_jax.simulation.scenario import SimOptions


def study(**fields):
    config = get_config()
    config.update_from_flattened_dict(fields)
    return config


def test_the_papers_system():
    case = case_study(get_config())
    assert (case.n_prfaas, case.n_pd, case.prfaas.name, case.pd.name) == (4, 8, "8xH200 paper_1t", "8xH20 paper_1t")
    assert (case.b_out, case.local_bytes_per_s, case.rtt_s, case.window_bytes) == (100 * GBPS, 800 * GBPS, 0.0, math.inf)
    assert (case.kv.state_bytes, case.kv.bytes_per_token) == (182_353_920, 17_280)


def test_simulation_fields_are_the_defaults():
    assert get_config().sim.to_dict() == dataclasses.asdict(SimOptions())


def test_fields_reach_the_system():
    case = case_study(study(link_gbps=8.0, rtt_ms=50.0, window_mib=16.0, prfaas_cost=3.0, n_prfaas=2))
    assert (case.b_out, case.rtt_s, case.window_bytes) == (1e9, 0.05, 2**24)
    assert (case.prfaas.cost_per_hour, case.pd.cost_per_hour, case.n_prfaas) == (3.0, 1.0, 2)
    mix = mix_of(study(**{"workload.mu": 8.0, "workload.sigma": 0.1, "workload.output_tokens": 7}))
    assert mix.mean(mix.tokens) == pytest.approx(math.exp(8.005), rel=1e-3) and mix.mean(mix.output) == 7
    assert lengths_of(study(**{"workload.low": 500})).low == 500


def test_a_trace_is_read_whole(tmp_path):
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:17:0{i}.0000000,{100 * (i + 1)},{10 + i}" for i in range(5)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    mix = mix_of(study(trace=str(path)))
    assert mix.tokens.tolist() == [100, 200, 300, 400, 500] and mix.output.tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_prfaas", 0),
        ("n_pd", 0),
        ("link_gbps", -3.0),
        ("link_gbps", math.inf),
        ("local_gbps", 0.0),
        ("rtt_ms", -1.0),
        ("window_mib", math.nan),
        ("prfaas_cost", -1.0),
        ("pd_cost", math.inf),
        ("rate", -1.0),
        ("efficiency", -0.5),
        ("load", 0.0),
        ("t_step", 0.0),
        ("reading", "median"),
        ("n_prefill_local", 8),
        ("n_prefill_local", -2),
        ("requests", 0),
        ("pd_profile", "h200_paper_1t"),
    ],
)
def test_impossible_studies_are_refused_by_name(field, value):
    with pytest.raises(InvalidInput) as error:
        case_study(study(**{field: value}))
    assert error.value.field == f"config.{field}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "paper_2t"}, "model='paper_2t'"),
        ({"prfaas_profile": "h300"}, "profile='h300'"),
        ({"pd_profile": "none.json"}, "profile file='none.json'"),
    ],
)
def test_unknown_parts_are_refused(fields, message):
    with pytest.raises(InvalidInput) as error:
        case_study(study(**fields))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workload.sigma": 0.0}, "lengths.sigma=0.0"),
        ({"workload.mu": 50.0}, "lengths.mu=50.0"),
        ({"workload.low": 0}, "lengths.low=0"),
        ({"workload.output_tokens": 0}, "config.workload.output_tokens=0"),
        ({"trace": "none.jsonl"}, "trace.path='none.jsonl'"),
        ({"trace": "pyproject.toml"}, "trace.path='pyproject.toml'"),
    ],
)
def test_impossible_mixes_are_refused(fields, message):
    with pytest.raises(InvalidInput) as error:
        mix_of(study(**fields))
    assert message in str(error.value)
