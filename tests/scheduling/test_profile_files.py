import json

import pytest

from configs.profiles import load_profile
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import to_json
from prfaas_jax.scheduling.profile_files import instance_from_dict, read_profile
from prfaas_jax.scheduling.profiles import FittedDecode, FittedPrefill, Instance, MeasuredDecode, MeasuredPrefill, prefill_s

PROFILE = {
    "name": "box",
    "model": "m",
    "basis": "fitted",
    "prefill": {"start_s": 0.1, "linear_s": 1, "quadratic_s": 0.02, "max_tokens": 9000},
    "decode": {"base_s": 0.02, "per_request_s": 0.001, "per_kv_token_s": 0.0},
    "max_batch": 16,
    "kv_memory_gib": 4,
    "nic_gbps": 10,
    "cost_per_hour": 3,
}

BENCH = {
    "checkpoint": "random:qwen3_bench",
    "prefill_tok_s": {"512": 1024.0, "128": 512.0, "2048": 1024.0},
    "decode_tok_s": {"1": 10.0, "8": 40.0},
    "vs_hf": None,
}

ROW = {"model": "qwen3_8b", "context": 2048, "batch": 32, "prefill_tok_s": 20480.0, "decode_tok_s": 3200.0, "decode_step_s": 0.01}

COMPILED = {
    "target": "tpu:v5e:4x4",
    "chips": 16,
    "model": "qwen3_8b",
    "prefill": {"rows": 2, "tokens": 512, "roofline_s": 0.004},
    "decode": {"rows": 32, "tokens": 32, "roofline_s": 0.003},
}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_the_whole_form():
    assert instance_from_dict(PROFILE) == Instance(
        "box",
        FittedPrefill(0.1, 1.0, 0.02, 9000),
        FittedDecode(0.02, 0.001, 0.0),
        max_batch=16,
        kv_memory_bytes=4 * 2**30,
        nic_bytes_per_s=1.25e9,
        cost_per_hour=3.0,
        basis="fitted",
    )


def test_tables_and_defaults():
    tables = {"name": "t", "prefill": {"tokens": [10, 20], "seconds": [1, 2.0]}, "decode": {"batches": [4], "seconds": [0.5]}}
    assert instance_from_dict(tables) == Instance("t", MeasuredPrefill((10, 20), (1.0, 2.0)), MeasuredDecode((4,), (0.5,)))
    nones = {"name": "t", "prefill": {"start_s": 0, "linear_s": 1}, "decode": None, "kv_memory_gib": None, "nic_gbps": None}
    assert instance_from_dict(nones) == Instance("t", FittedPrefill(0.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "profile=['colour']: expected only the fields name, prefill"),
        ({"name": 3}, "profile.name=3"),
        ({"name": ""}, "profile.name=''"),
        ({"basis": 1}, "profile box.basis=1"),
        ({"basis": "guess"}, "instance box.basis='guess'"),
        ({"prefill": [1]}, "profile box.prefill=[1]"),
        ({"prefill": {"start_s": 1}}, "profile box.prefill=['start_s']: expected also the fields linear_s"),
        ({"prefill": {"start_s": "1", "linear_s": 1}}, "profile box.prefill.start_s='1'"),
        ({"prefill": {"start_s": 1, "linear_s": 1, "cubic_s": 1}}, "profile box.prefill=['cubic_s']"),
        ({"prefill": {"start_s": 1, "linear_s": 1, "max_tokens": 1.5}}, "profile box.prefill.max_tokens=1.5"),
        ({"prefill": {"tokens": [1, 2]}}, "expected also the fields seconds"),
        ({"prefill": {"tokens": 5, "seconds": [1]}}, "profile box.prefill.tokens=5: expected a list"),
        ({"prefill": {"tokens": [1, True], "seconds": [1, 2]}}, "profile box.prefill.tokens=True"),
        ({"decode": {"batches": [1], "seconds": ["x"]}}, "profile box.decode.seconds='x'"),
        ({"decode": {}}, "expected also the fields base_s"),
        ({"max_batch": 0}, "profile box.max_batch=0"),
        ({"kv_memory_gib": -1}, "kv_memory_bytes"),
        ({"nic_gbps": "fast"}, "profile box.nic_gbps='fast'"),
        ({"cost_per_hour": None}, "profile box.cost_per_hour=None"),
    ],
)
def test_wrong_forms_are_refused(change, message):
    with pytest.raises(InvalidInput) as error:
        instance_from_dict(PROFILE | change)
    assert message in str(error.value)


def test_a_profile_needs_its_fields():
    with pytest.raises(InvalidInput, match="also the fields name, prefill"):
        instance_from_dict({})
    with pytest.raises(InvalidInput, match="fields by name"):
        instance_from_dict([1])  # type: ignore[arg-type]


def test_a_profile_file_comes_back(tmp_path):
    path = write(tmp_path / "box.json", to_json(PROFILE))
    assert read_profile(path) == load_profile(str(path)) == instance_from_dict(PROFILE)
    assert read_profile(path, cost_per_hour=7, max_batch=2) == instance_from_dict(PROFILE | {"cost_per_hour": 7, "max_batch": 2})


def test_bench_engine(tmp_path):
    found = read_profile(write(tmp_path / "summary.json", BENCH), cost_per_hour=0.5)
    assert found.prefill == MeasuredPrefill((128, 512, 2048), (0.25, 0.5, 2.0))
    assert found.decode == MeasuredDecode((1, 8), (0.1, 0.2))
    assert (found.name, found.basis, found.max_batch, found.cost_per_hour) == ("bench_engine qwen3_bench", "measured", 8, 0.5)


def test_device_check(tmp_path):
    both = {"measured": [ROW, ROW | {"model": "other", "prefill_tok_s": 100.0}], "skipped": []}
    engine = write(tmp_path / "engine.json", both)
    found = read_profile(engine, model="qwen3_8b")
    assert prefill_s(found.prefill, 2048) == pytest.approx(0.1) and found.prefill.max_tokens == 2048
    assert found.decode == MeasuredDecode((32,), (0.01,))
    assert (found.basis, found.max_batch) == ("measured", 32)
    summary = write(tmp_path / "summary.json", {"device": "H200", "engine": {"qwen3_8b": {"prefill_tok_s": 1.0}}, "failed": []})
    assert read_profile(summary) == found  # one of the two is in the summary
    with pytest.raises(InvalidInput, match=r"model=None: expected one of the models that were measured: \['other', 'qwen3_8b'\]"):
        read_profile(engine)
    with pytest.raises(InvalidInput, match="model='third'"):
        read_profile(engine, model="third")
    engine.unlink()
    with pytest.raises(InvalidInput, match=r"engine\.json beside the summary"):
        read_profile(summary)


def test_a_compiled_step_is_a_bound_with_a_stated_efficiency(tmp_path):
    path = write(tmp_path / "summary.json", COMPILED)
    write(tmp_path / "config.json", {"context": 4096, "chunk": 256, "batch": 32})
    found = read_profile(path, efficiency=0.5)
    assert found.basis == "bound" and "0.5 of its roofline" in found.name
    assert prefill_s(found.prefill, 512) == pytest.approx(0.008) and found.prefill.max_tokens == 4096
    assert found.decode == MeasuredDecode((32,), (0.006,)) and found.max_batch == 32
    sizes_of_config = {**COMPILED, "prefill": {"roofline_s": 0.004}, "decode": {"roofline_s": 0.003}}
    other = read_profile(write(tmp_path / "summary.json", sizes_of_config), efficiency=1)
    assert prefill_s(other.prefill, 256) == pytest.approx(0.004) and other.max_batch == 32


@pytest.mark.parametrize("efficiency", [None, 0, -0.5, 1.01, float("nan"), "half", True])
def test_an_efficiency_is_required(efficiency, tmp_path):
    write(tmp_path / "config.json", {"context": 4096, "chunk": 256, "batch": 32})
    with pytest.raises(InvalidInput, match="efficiency="):
        read_profile(write(tmp_path / "summary.json", COMPILED), efficiency=efficiency)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", {}, "a readable JSON file"),
        ("[1]", {}, "it has list"),
        ({"a": 1}, {}, "it has ['a']"),
        (PROFILE, {"efficiency": 0.5}, "is no summary of compile_for"),
        (PROFILE, {"model": "other"}, "model='other': expected 'm'"),
        (PROFILE, {"speed": 3}, "profile=['speed']"),
        (BENCH | {"decode_tok_s": {}}, {}, "decode_tok_s={}"),
        (BENCH | {"decode_tok_s": {"x": 1.0}}, {}, "decode_tok_s[x]"),
        (BENCH | {"prefill_tok_s": {"1": 0.0}}, {}, "prefill_tok_s[1]=0.0"),
        ({"measured": []}, {}, "none was"),
        ({"measured": [ROW | {"context": None}]}, {}, "engine qwen3_8b.context=None"),
        ({"measured": [ROW | {"decode_tok_s": 0}]}, {}, "engine qwen3_8b.decode_tok_s=0"),
        (COMPILED, {"efficiency": 0.5}, "compile_for context, in config.json beside the summary=None"),
        (COMPILED | {"prefill": {"message": "out of memory"}}, {"efficiency": 0.5}, "out of memory"),
        (COMPILED | {"decode": None}, {"efficiency": 0.5}, "compile_for decode=None"),
        (COMPILED | {"decode": {"roofline_s": 0}}, {"efficiency": 0.5}, "compile_for decode.roofline_s=0"),
    ],
)
def test_files_that_make_no_profile_are_refused(content, options, message, tmp_path):
    with pytest.raises(InvalidInput) as error:
        read_profile(write(tmp_path / "file.json", content), **options)
    assert message in str(error.value)


def test_what_was_looked_for_is_named(tmp_path):
    with pytest.raises(InvalidInput) as error:
        read_profile(write(tmp_path / "file.json", {}))
    for what in ("a profile", "bench_engine", "device_check", "compile_for"):
        assert what in str(error.value)
    with pytest.raises(InvalidInput, match="a readable JSON file"):
        read_profile(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["h300", "", "__init__", "configs/profiles/none.py", "../profiles/h20_paper_1t"])
def test_unknown_profiles_list_what_exists(name):
    with pytest.raises(InvalidInput, match="h200_paper_1t"):
        load_profile(name)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs.profiles.h20_paper_1t import get_config as base\n"
        "def get_config():\n    config = base()\n    config.max_batch = 40\n    return config\n"
    )
    assert load_profile(str(path)).max_batch == 40
    path.write_text("x = 1\n")
    with pytest.raises(InvalidInput, match="get_config"):
        load_profile(str(path))
