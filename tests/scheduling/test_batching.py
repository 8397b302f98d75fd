import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.batching import (
    PATIENCE,
    STEP_COST,
    Bucket,
    PrefillChoice,
    PrefillItem,
    choose_prefill,
    decode_bucket,
    decode_buckets,
    next_tokens,
    prefill_buckets,
)


def item(ticket: str, length: int, *, start: int = 0, shard: int = 0, last_step: int = -1, arrival: int = 0) -> PrefillItem:
    return PrefillItem(ticket, start, length, shard, last_step, arrival)


def tickets(choice: PrefillChoice) -> list[str]:
    return [row.ticket for row in choice.rows]


def advance(items: dict[str, PrefillItem], choice: PrefillChoice, step: int) -> None:
    """What an engine does after a step: move the rows on, drop the finished."""
    for row in choice.rows:
        moved = dataclasses.replace(items.pop(row.ticket), start=row.start + row.tokens, last_step=step)
        if moved.start < moved.length:
            items[row.ticket] = moved


@st.composite
def loads(draw):
    shards = draw(st.sampled_from([1, 2, 4]))
    chunk = 64 * draw(st.integers(1, 9))
    buckets = prefill_buckets(chunk, shards * draw(st.integers(1, 4)), shards)
    items = []
    for i in range(draw(st.integers(1, 12))):
        length = draw(st.integers(1, 5 * chunk))
        start = draw(st.integers(0, (length - 1) // 64)) * 64
        items.append(item(f"t{i}", length, start=start, shard=draw(st.integers(0, shards - 1)), arrival=draw(st.integers(0, 3))))
    return shards, chunk, buckets, items


@given(loads())
def test_every_token_is_computed_once_on_the_chunk_grid(load):
    shards, chunk, buckets, items = load
    waiting = {i.ticket: i for i in items}
    spans: dict[str, list[tuple[int, int]]] = {i.ticket: [] for i in items}
    steps = 0
    while waiting:
        choice = choose_prefill(waiting.values(), buckets, chunk)
        assert choice.bucket in buckets
        assert len({row.row for row in choice.rows}) == len(choice.rows)
        for row in choice.rows:
            assert row.tokens <= choice.bucket.tokens
            assert row.start % chunk + row.tokens <= chunk, "a row crosses the chunk grid"
            assert row.row // (choice.bucket.rows // shards) == waiting[row.ticket].shard
            spans[row.ticket].append((row.start, row.start + row.tokens))
        advance(waiting, choice, steps)
        steps += 1
    for i in items:
        ends = [i.start, *(stop for _, stop in spans[i.ticket])]
        assert [start for start, _ in spans[i.ticket]] == ends[:-1] and ends[-1] == i.length
        assert all(end % chunk == 0 for end in ends[1:-1])
    assert steps <= sum(len(s) for s in spans.values())


@given(loads(), st.randoms(use_true_random=False))
def test_order_of_items_does_not_matter(load, rng):
    _, chunk, buckets, items = load
    shuffled = list(items)
    rng.shuffle(shuffled)
    assert choose_prefill(items, buckets, chunk) == choose_prefill(shuffled, buckets, chunk)


@given(loads())
def test_takes_the_smallest_bucket_that_holds_the_rows(load):
    shards, chunk, buckets, items = load
    choice = choose_prefill(items, buckets, chunk)
    blocks = [[row for row in choice.rows if next(i for i in items if i.ticket == row.ticket).shard == s] for s in range(shards)]
    need = Bucket(max(len(b) for b in blocks) * shards, max(row.tokens for row in choice.rows))
    holding = [b for b in buckets if b.rows >= need.rows and b.tokens >= need.tokens]
    assert choice.bucket == min(holding, key=lambda b: b.rows * b.tokens)


@given(loads())
def test_sharing_a_step_never_costs_more_than_separate_steps(load):
    shards, chunk, buckets, items = load

    def cost(bucket: Bucket) -> int:
        return bucket.rows // shards * bucket.tokens + STEP_COST

    choice = choose_prefill(items, buckets, chunk)
    apart = sum(cost(min((b for b in buckets if b.rows == shards and b.tokens >= row.tokens), key=cost)) for row in choice.rows)
    assert cost(choice.bucket) <= apart


@given(loads(), st.integers(0, 40))
def test_a_new_item_waits_one_step_per_new_item_before_it(load, steps_before):
    _, chunk, buckets, items = load
    waiting = {i.ticket: i for i in items}
    for step in range(steps_before):
        if not waiting:
            break
        advance(waiting, choose_prefill(waiting.values(), buckets, chunk), step)
    ahead = sum(i.last_step < 0 for i in waiting.values())
    waiting["new"] = item("new", 100, arrival=10)
    for waited in range(ahead + 1):
        choice = choose_prefill(waiting.values(), buckets, chunk)
        if "new" in tickets(choice):
            return
        advance(waiting, choice, steps_before + waited)
    pytest.fail(f"not served within {ahead + 1} steps")


@pytest.mark.parametrize("max_rows", [1, 8])
def test_a_short_prompt_is_not_behind_a_long_one(max_rows):
    buckets = prefill_buckets(1024, max_rows)
    long = item("long", 100_000, start=1024, last_step=0)
    short = item("short", 100, arrival=1)
    choice = choose_prefill([long, short], buckets, 1024)
    assert tickets(choice) == ["short"] and choice.bucket == Bucket(1, 256)


@pytest.mark.parametrize("max_rows", [1, 4])
def test_a_stream_of_new_prompts_does_not_starve_a_started_one(max_rows):
    buckets = prefill_buckets(256, max_rows)
    waiting = {"long": item("long", 1000, start=256, last_step=0)}
    served = []
    for step in range(1, 4 * PATIENCE):
        for n in range(max_rows):  # as many new ones each step as the largest bucket holds
            waiting[f"{step}.{n}"] = item(f"{step}.{n}", 200, arrival=step)
        choice = choose_prefill(waiting.values(), buckets, 256, step)
        if "long" in tickets(choice):
            served.append(step)
        advance(waiting, choice, step)
        if "long" not in waiting:
            break
    assert "long" not in waiting
    assert max(b - a for a, b in zip([0, *served], served, strict=False)) <= PATIENCE + 1


def test_long_rows_take_turns():
    buckets = prefill_buckets(256, 1)
    waiting = {t: item(t, 10_000, arrival=n) for n, t in enumerate("abc")}
    seen = []
    for step in range(6):
        choice = choose_prefill(waiting.values(), buckets, 256)
        seen += tickets(choice)
        advance(waiting, choice, step)
    assert seen == ["a", "b", "c"] * 2


def test_many_short_rows_share_a_step_and_few_do_not():
    buckets = prefill_buckets(1024, 8)
    many = choose_prefill([item(f"s{n}", 60, arrival=n) for n in range(8)], buckets, 1024)
    assert many.bucket == Bucket(8, 64) and len(many.rows) == 8
    few = choose_prefill([item(f"s{n}", 60, arrival=n) for n in range(2)], buckets, 1024)
    assert few.bucket == Bucket(1, 64) and tickets(few) == ["s0"]


def test_free_rows_of_other_shards_are_used():
    buckets = prefill_buckets(256, 2, shards=2)
    choice = choose_prefill([item("a", 60), item("b", 256, shard=1, start=0, last_step=3)], buckets, 256)
    assert choice.bucket == Bucket(2, 256)
    assert [(row.ticket, row.row) for row in choice.rows] == [("a", 0), ("b", 1)]


def test_a_prefix_hit_ends_its_first_row_on_the_grid():
    hit = item("hit", 1000, start=320)
    assert next_tokens(hit, 256) == 192
    assert next_tokens(dataclasses.replace(hit, start=960), 256) == 40


@pytest.mark.parametrize("chunk", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize(("max_rows", "shards"), [(1, 1), (8, 1), (8, 4)])
def test_prefill_buckets_are_few_and_whole(chunk, max_rows, shards):
    buckets = prefill_buckets(chunk, max_rows, shards)
    assert len(buckets) <= 8 and len(set(buckets)) == len(buckets)
    assert {b.rows for b in buckets} == {shards, max_rows}
    assert min(b.tokens for b in buckets) == 64 and max(b.tokens for b in buckets) == chunk
    assert all(b.tokens % 64 == 0 for b in buckets)


def test_decode_buckets():
    assert decode_buckets(8) == (8,)
    assert decode_buckets(64) == (8, 16, 32, 64)
    assert decode_buckets(48, shards=2) == (8, 16, 32, 48)
    assert all(b % 3 == 0 for b in decode_buckets(24, shards=3))
    buckets = decode_buckets(64)
    assert [decode_bucket(n, buckets) for n in (1, 8, 9, 33, 64)] == [8, 8, 16, 64, 64]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: prefill_buckets(100, 1), "prefill_chunk=100"),
        (lambda: prefill_buckets(0, 1), "prefill_chunk=0"),
        (lambda: prefill_buckets(64, 3, 2), "prefill_rows=3"),
        (lambda: prefill_buckets(64, 1, 0), "shards=0"),
        (lambda: decode_buckets(4), "decode_rows=4"),
        (lambda: decode_bucket(65, (8, 64)), "decode rows=65"),
        (lambda: decode_bucket(0, (8, 64)), "decode rows=0"),
        (lambda: choose_prefill([], prefill_buckets(64, 1), 64), "items=[]"),
        (lambda: choose_prefill([item("a", 9), item("a", 9)], prefill_buckets(64, 1), 64), "every ticket once"),
        (lambda: choose_prefill([item("a", 9, start=9)], prefill_buckets(64, 1), 64), "items[a].start=9"),
        (lambda: choose_prefill([item("a", 9, shard=1)], prefill_buckets(64, 1), 64), "items[a].shard=1"),
        (lambda: choose_prefill([item("a", 9)], prefill_buckets(64, 1), 128), "chunk=128"),
    ],
)
def test_bad_input_names_the_field(call, field):
    with pytest.raises(InvalidInput) as error:
        call()
    assert field in str(error.value)
