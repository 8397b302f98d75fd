"""Work by formula, against counting: pairs of queries and keys, products of each form, bytes of what a request leaves behind."""

import dataclasses

import pytest

from configs.models import available_models, load_model_config
from prfaas_jax.engine.flops import (
    CHUNK,
    Spread,
    Work,
    cache_bytes,
    island_flops,
    matmul_params,
    mixer_flops,
    mlp_flops,
    unread_parameter_bytes,
)
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.layer_config import (
    AttentionConfig,
    DenseConfig,
    GatedDeltaConfig,
    KdaConfig,
    LatentConfig,
    LightningConfig,
    MoeConfig,
)

ATTENTION = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=24, value_dim=16)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 7), (3, 1), (3, 9), (16, 4), (90, 30)])
def test_pairs_are_what_counting_finds(window, start, tokens):
    counted = sum(1 for i in range(start, start + tokens) for j in range(i + 1) if window is None or i - j <= window)
    assert Work(1, tokens, start, decode=False).pairs(window) == counted


def test_chunks_of_a_prompt_add_up_to_the_whole_prompt():
    for mixer in (ATTENTION, dataclasses.replace(ATTENTION, window=50), KdaConfig(4, 16, 8, 16), LightningConfig(4, 16)):
        chunks = sum(mixer_flops(mixer, Work(1, 64, start, decode=False)) for start in range(0, 256, 64))
        assert chunks == mixer_flops(mixer, Work(1, 256, 0, decode=False))


def test_attention_takes_a_score_and_a_weighted_value_per_pair():
    decode = Work.decoding(rows=3, context=100)
    assert mixer_flops(ATTENTION, decode) == 3 * 101 * 6 * 2 * (24 + 16)
    assert mixer_flops(dataclasses.replace(ATTENTION, window=10), decode) == 3 * 11 * 6 * 2 * (24 + 16)


def test_latents_are_absorbed_when_decoding_and_expanded_once_otherwise():
    mla = LatentConfig(num_heads=4, kv_lora_rank=32, nope_dim=16, rope_dim=8, value_dim=12)
    per_token = 4 * 2 * 32 * (16 + 12)  # through k_up and v_up
    assert mixer_flops(mla, Work.decoding(2, 100)) == 2 * (101 * 4 * 2 * (32 + 8 + 32) + per_token)
    prefill = Work.prefill(2, chunk=64, context=128)
    pairs = sum(range(65, 129))
    assert mixer_flops(mla, prefill) == 2 * (pairs * 4 * 2 * (16 + 8 + 12) + 128 * per_token)


@pytest.mark.parametrize(
    ("mixer", "heads", "products", "within"),
    [
        (KdaConfig(4, 16, 8, 16), 4, 3 * 16 * 8, 3 * 16 + 2 * 8),
        (GatedDeltaConfig(2, 4, 16, 8), 4, 3 * 16 * 8, 3 * 16 + 2 * 8),
        (LightningConfig(4, 16), 4, 2 * 16 * 16, 2 * 16),
    ],
)
def test_recurrences_cost_the_same_at_any_length(mixer, heads, products, within):
    for context in (64, 4096):
        assert mixer_flops(mixer, Work.decoding(5, context)) == 5 * heads * 2 * products
        # Within a chunk a token meets half of it.
        chunk = mixer_flops(mixer, Work.prefill(1, 64, context))
        assert chunk == 64 * heads * (2 * products + 2 * CHUNK / 2 * within)


def test_experts_cost_what_a_token_is_sent_to():
    moe = MoeConfig(num_experts=8, top_k=3, intermediate_size=32, shared_size=16, shared_gate=True)
    assert mlp_flops(moe, 64, Work.decoding(5, 100)) == 5 * (6 * 64 * (3 * 32 + 16) + 2 * 64)
    assert mlp_flops(DenseConfig(128), 64, Work.decoding(5, 100)) == 0


def test_a_mesh_divides_work_but_replicated_attention_is_done_by_all():
    config = load_model_config("kimi_linear_toy")
    work = Work.decoding(8, 256)
    whole = island_flops(config, work, Spread())
    assert set(whole) == {"kda", "mla", "moe"}
    assert island_flops(config, work, Spread(2, 4, 4)) == {kind: flops / 8 for kind, flops in whole.items()}
    replicated = island_flops(config, work, Spread(1, 4, 1))
    assert replicated == {"kda": whole["kda"], "mla": whole["mla"], "moe": whole["moe"] / 4}


def test_of_experts_only_those_are_read_that_tokens_reach():
    config = load_model_config("qwen3_moe_toy")  # 8 experts, 2 per token, 4 layers
    experts, embedding = 4 * 4 * 3 * 8 * 64 * 32, 4 * 512 * 64
    assert not config.tie_embeddings
    for rows, share in ((1, 6 / 8), (3, 2 / 8), (4, 0), (100, 0)):
        assert unread_parameter_bytes(config, Work.decoding(rows, 100), Spread()) == embedding + experts * share
    # Each of two data shards sees its own tokens only, and each device holds its share.
    assert unread_parameter_bytes(config, Work.decoding(6, 100), Spread(2, 4, 4)) == (embedding + experts * 2 / 8) / 4
    tied = load_model_config("qwen3_0_6b")
    assert tied.tie_embeddings and unread_parameter_bytes(tied, Work.decoding(1, 100), Spread()) == 0


@pytest.mark.parametrize("model", ["qwen3_toy", "kimi_linear_toy", "mimo_toy", "lightning_toy", "gemma3_toy"])
def test_a_decode_step_reads_the_whole_cache_and_writes_one_token(model):
    config = load_model_config(model)
    spec = cache_spec(config)
    one = sum(g.bytes(1) for g in spec.groups)
    assert cache_bytes(config, Work.decoding(3, 100), Spread()) == 3 * (spec.bytes(100) + one)
    # Prefill from the start reads nothing and writes what it leaves behind twice: to the pool, and as what is exported.
    assert cache_bytes(config, Work.prefill(3, 256, 256), Spread()) == 3 * 2 * spec.bytes(256)


def test_bytes_per_device_follow_where_heads_lie():
    mla, gqa = load_model_config("deepseek_toy"), load_model_config("qwen3_toy")  # one shared latent; 4 kv heads
    work = Work.decoding(8, 100)
    assert cache_bytes(mla, work, Spread(1, 4, 4)) == cache_bytes(mla, work, Spread())
    heads = gqa.layers[0].mixer.num_kv_heads
    whole = cache_bytes(gqa, work, Spread())
    assert cache_bytes(gqa, work, Spread(1, heads, heads)) == whole / heads
    assert cache_bytes(gqa, work, Spread(1, 2 * heads, 2 * heads)) == whole / heads  # copies: one head each
    assert cache_bytes(gqa, work, Spread(2, 2, 1)) == whole / 2  # replicated attention


def test_weights_that_a_token_meets():
    for model in available_models():
        config = load_model_config(model)
        active = matmul_params(config)
        assert 0 < active <= config.num_params()
    dense = load_model_config("qwen3_toy")
    assert matmul_params(dense) == dense.num_params() - 512 * 64  # tied
    # Published as 3 B and 17 B active.
    embeddings = 2 * 163_840 * 2304
    assert matmul_params(load_model_config("kimi_linear_48b")) + embeddings == pytest.approx(3e9, rel=0.2)
    assert matmul_params(load_model_config("qwen3_5_397b")) == pytest.approx(17e9, rel=0.1)
