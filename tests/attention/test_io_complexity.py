"""I/O complexity: exact attention, exactly the words of the closed forms, never fewer than the bound, two regimes."""

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from reference import dense_attention
from toolkit.attention import _io_complexity_caches as caches
from toolkit.attention import _io_complexity_pebbles as pebbles
from toolkit.attention import _io_complexity_rivals as rivals
from toolkit.attention import _io_complexity_traces as traces
from toolkit.attention import io_complexity as io
from toolkit.kernels import fast_memory
from toolkit.kernels.fast_memory import CapacityError, FastMemory, NotResident, add_products, divide
from toolkit.runtime import like
from toolkit.runtime.errors import DtypeError, ShapeError

CLOSED = {
    io.flash: io.flash_io,
    io.flash_keys_outside: io.flash_keys_outside_io,
    io.small_cache: io.small_cache_io,
    rivals.untiled: rivals.untiled_io,
    rivals.small_cache_strassen: rivals.small_cache_strassen_io,
}
STANDARD = [io.flash, io.flash_keys_outside, io.small_cache, rivals.untiled]  # each score a sum of d products
SHAPES = [(16, 4, 48), (24, 6, 27), (37, 5, 64), (50, 6, 30), (64, 8, 128), (7, 16, 1000), (2, 2, 11)]  # n, d, M
EVEN = [shape for shape in SHAPES if shape[0] % 2 == shape[1] % 2 == 0]
CASES = [(a, *s) for a in STANDARD for s in SHAPES] + [(rivals.small_cache_strassen, *s) for s in EVEN]


def fits(algorithm, d, M):
    """Whether a tile of one query and one key fits; three words do for the small cache."""
    return algorithm in (io.small_cache, rivals.small_cache_strassen) or M >= 4 * d + 3


NAMES = [f"{a.__name__}-{n}-{d}-{M}" for a, n, d, M in CASES]


def normal(tokens, head_dim, heads=1, seed=0):
    return np.random.default_rng(seed).standard_normal((3, heads, tokens, head_dim))


def one_machine(capacity, **arrays):
    return FastMemory(capacity, {"x": np.arange(12.0).reshape(4, 3), **arrays})


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_a_block_costs_its_words_once_in_and_once_out():
    fast = one_machine(100)
    block = fast.load("x", slice(1, 3))
    fast.store(block, "x", slice(0, 2))
    assert fast.io == 6 + 6


def test_room_for_scratch_costs_nothing_but_counts_as_resident():
    fast = one_machine(100)
    fast.alloc(5, 4)
    assert (fast.io, fast.used, fast.peak) == (0, 20, 20)


@pytest.mark.parametrize("capacity, fits", [(12, True), (11, False)])
def test_fast_memory_holds_its_capacity_and_not_a_word_more(capacity, fits):
    fast = one_machine(capacity)
    if fits:
        fast.load("x")
    else:
        with pytest.raises(CapacityError, match="load of 12 words 'x' with 0 resident: fast memory holds 11"):
            fast.load("x")


def test_what_is_freed_makes_room():
    fast = one_machine(12)
    fast.free(fast.load("x"))
    fast.load("x")
    assert (fast.used, fast.peak) == (12, 12)


def test_a_freed_block_is_poisoned():
    fast = one_machine(12)
    block = fast.load("x")
    fast.free(block)
    assert np.isnan(block).all()


def test_new_room_is_poisoned_until_it_is_filled():
    assert np.isnan(one_machine(12).alloc(2, 2)).all()


def test_slow_memory_is_not_what_fast_memory_hands_out():
    fast = one_machine(12)
    fast.load("x")[:] = 7
    assert_array_equal(fast.slow["x"], np.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize("operand", ["freed", "slow", "view"])
def test_arithmetic_on_what_is_not_resident_is_refused(operand):
    fast = one_machine(50)
    block, other = fast.load("x"), fast.load("x")
    fast.free(other)
    wrong = {"freed": other, "slow": fast.slow["x"], "view": block[:2]}[operand]
    with pytest.raises(NotResident, match="divide: operand 1 is not in fast memory"):
        fast.compute(divide, block, wrong)


def test_a_block_goes_only_where_it_fits():
    fast = one_machine(50)
    with pytest.raises(ShapeError, match=r"a block of \(4, 3\) does not fit x"):
        fast.store(fast.load("x"), "x", slice(0, 2))


@pytest.mark.parametrize(
    "instruction, want",
    [
        (fast_memory.add_products, lambda a, b: a + b @ b.T),
        (fast_memory.add_weighted, lambda a, b: a + b @ b),
        (fast_memory.add, lambda a, b: a + b),
        (fast_memory.subtract, lambda a, b: a - b),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_an_instruction_equals_numpy(instruction, want):
    a, b = np.random.default_rng(1).standard_normal((2, 5, 5))
    got = a.copy()
    instruction(got, b, b) if "products" in instruction.name or "weighted" in instruction.name else instruction(got, b)
    assert_allclose(got, want(a, b), rtol=0, atol=1e-13)


# ---- exact attention, exact counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, tokens, head_dim, capacity", CASES, ids=NAMES)
def test_equals_dense_attention_for_any_tile(algorithm, tokens, head_dim, capacity):
    q, k, v = normal(tokens, head_dim, heads=2)
    got = io.run(algorithm, q, k, v, capacity).out
    assert_allclose(got, dense_attention(q, k, v)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("algorithm, tokens, head_dim, capacity", CASES, ids=NAMES)
def test_words_are_the_closed_form(algorithm, tokens, head_dim, capacity):
    fast = io.count(algorithm, tokens, head_dim, capacity)
    assert fast.io == CLOSED[algorithm](tokens, head_dim, capacity)


@pytest.mark.parametrize("algorithm, tokens, head_dim, capacity", CASES, ids=NAMES)
def test_data_and_shapes_alone_count_the_same(algorithm, tokens, head_dim, capacity):
    with_data = io.run(algorithm, *normal(tokens, head_dim), capacity)
    without = io.run(algorithm, *[like((1, tokens, head_dim))] * 3, capacity)
    assert [fast.trace for fast in with_data.machines] == [fast.trace for fast in without.machines]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 400))
def test_words_are_the_closed_form_for_ragged_sizes_too(tokens, head_dim, more):
    capacity = 4 * head_dim + 3 + more
    for algorithm in STANDARD:
        fast = io.count(algorithm, tokens, head_dim, capacity)
        assert fast.io == CLOSED[algorithm](tokens, head_dim, capacity), algorithm.__name__
        assert fast.peak <= capacity and fast.used == 0


@pytest.mark.parametrize("algorithm", STANDARD)
def test_heads_add_up(algorithm):
    one, three = (io.run(algorithm, *[like((heads, 20, 4))] * 3, 60) for heads in (1, 3))
    assert (three.io, three.peak) == (3 * one.io, one.peak)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("algorithm", STANDARD)
def test_large_scores_do_not_overflow(algorithm, scale):
    q, k, v = normal(20, 4) * np.array([scale, scale, 1]).reshape(3, 1, 1, 1)
    assert_allclose(io.run(algorithm, q, k, v, 60).out, dense_attention(q, k, v)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n, d, M", [(32, 4, 40), (64, 8, 256), (40, 16, 512)])
def test_flash_moves_what_its_tile_says(n, d, M):
    rows, keys = io.flash_tile(n, d, M)
    assert 2 * rows * d + 2 * keys * d + rows * keys + 2 * rows <= M
    assert io.count(io.flash, n, d, M).io == 2 * n * d + -(-n // rows) * 2 * n * d


@pytest.mark.parametrize("n, d, M", [(24, 3, 40), (31, 8, 100), (64, 4, 200), (48, 16, 700)])
def test_no_tile_moves_less_than_the_one_flash_takes(n, d, M):
    fitting = [r for r in range(1, n + 1) for c in range(1, n + 1) if 2 * r * d + 2 * c * d + r * c + 2 * r <= M]
    assert io.flash_io(n, d, M) == min(2 * n * d + -(-n // rows) * 2 * n * d for rows in fitting)


@pytest.mark.parametrize("n, d, M", [(24, 3, 40), (31, 8, 100), (48, 16, 700)])
def test_no_tile_moves_less_than_the_one_with_keys_outside(n, d, M):
    pairs = [(r, c) for r in range(1, n + 1) for c in range(1, n + 1)]
    fitting = [p for p in pairs if 2 * p[0] * d + 2 * p[1] * d + p[0] * p[1] + 2 * p[0] <= M]
    some = fitting[:: max(1, len(fitting) // 60)]
    counted = min(io.count(io.flash_keys_outside, n, d, M, tile=tile).io for tile in some)
    assert io.flash_keys_outside_io(n, d, M) <= counted


def test_with_room_for_all_queries_flash_moves_inputs_and_outputs_only():
    n, d = 32, 4
    enough = n * (2 * d + 3) + 2 * d
    assert io.count(io.flash, n, d, enough).io == 4 * n * d
    assert io.count(io.flash, n, d, enough - 1).io == 6 * n * d


@pytest.mark.parametrize("capacity", [3, 4, 11, 12])
def test_three_words_are_enough_for_the_small_cache(capacity):
    q, k, v = normal(9, 5)
    ran = io.run(io.small_cache, q, k, v, capacity)
    assert ran.peak <= capacity
    assert_allclose(ran.out, dense_attention(q, k, v)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n, d, M", [(64, 16, 96), (64, 16, 600), (32, 8, 3)])
def test_automatic_moves_the_fewer_words(n, d, M):
    others = [CLOSED[a](n, d, M) for a in (io.flash, io.small_cache) if fits(a, d, M)]
    assert io.count(io.automatic, n, d, M).io == min(others)


@pytest.mark.parametrize("algorithm", [io.flash, io.flash_keys_outside])
def test_flash_refuses_a_memory_without_room_for_one_query_and_one_key(algorithm):
    assert io.count(algorithm, 8, 5, 4 * 5 + 3).peak == 4 * 5 + 3
    with pytest.raises(ValueError, match=r"4·5 \+ 3 = 23 words .* got 22; use small_cache"):
        io.count(algorithm, 8, 5, 4 * 5 + 2)


def test_the_small_cache_refuses_two_words():
    with pytest.raises(ValueError, match="three words"):
        io.count(io.small_cache, 8, 5, 2)


@pytest.mark.parametrize("algorithm, tile", [(io.flash, (9, 9)), (io.flash_keys_outside, (9, 9)), (io.small_cache, 6)])
def test_a_tile_that_does_not_fit_is_an_error_and_not_a_smaller_tile(algorithm, tile):
    option = "side" if algorithm is io.small_cache else "tile"
    with pytest.raises(CapacityError):
        io.count(algorithm, 32, 8, 100, **{option: tile})


@pytest.mark.parametrize("wrong", [(8, 4), (1, 8, 5)])
def test_inputs_of_other_shapes_are_refused(wrong):
    with pytest.raises(ShapeError, match="all alike"):
        io.run(io.flash, np.zeros((1, 8, 4)), np.zeros(wrong), np.zeros((1, 8, 4)), 100)


def test_whole_numbers_are_refused():
    with pytest.raises(DtypeError, match="astype"):
        io.run(io.flash, *[np.zeros((1, 8, 4), int)] * 3, 100)


def test_a_schedule_that_forgets_to_rescale_is_caught(monkeypatch):
    forgetful = fast_memory.Instruction(lambda s, m, l, acc: np.exp(s, out=s), 4)  # noqa: E741
    monkeypatch.setattr(io, "online_softmax", forgetful)
    q, k, v = normal(16, 4)
    with np.errstate(all="ignore"):
        assert not np.allclose(io.run(io.flash, q, k, v, 48).out, dense_attention(q, k, v)[0])


# ---- the lower bound -------------------------------------------------------------------------------------------------

GRID = [(n, d, M) for n in (32, 96) for d in (8, 16, 32) for M in (16, 40, 100, 256, 1000, 4000, 16000)]


@pytest.mark.parametrize("algorithm, n, d, M", [(a, *s) for a in CLOSED for s in GRID if fits(a, *s[1:])])
def test_nobody_moves_fewer_words_than_the_bound(algorithm, n, d, M):
    assert io.count(algorithm, n, d, M).io >= io.lower_bound(n, d, M)


@pytest.mark.parametrize("n, d, M", GRID)
def test_the_bound_is_at_least_the_weaker_one_with_textbook_constants(n, d, M):
    weaker = n * n * d * d / (3 * M) - M if M >= d * d else n * n * d / (2 * 2**0.5 * M**0.5) - M
    assert io.lower_bound(n, d, M) >= max(4 * n * d, weaker)


@pytest.mark.parametrize("n, d", [(256, 16), (1024, 32), (1024, 64), (4096, 64), (4096, 128)])
def test_flash_is_within_a_constant_of_the_bound_from_d_squared_on(n, d):
    for M in np.geomspace(d * d, n * d / 4, 25).astype(int):
        assert io.flash_io(n, d, M) <= 12 * io.lower_bound(n, d, M)


@pytest.mark.parametrize("n, d", [(256, 16), (1024, 64), (4096, 128)])
def test_the_small_cache_is_within_a_constant_of_the_bound_below_d_squared(n, d):
    for M in np.geomspace(3, d * d - 1, 25).astype(int):
        assert io.small_cache_io(n, d, M) <= 20 * io.lower_bound(n, d, M)


def test_flash_is_not_within_a_constant_of_the_bound_below_d_squared():
    ratios = [io.flash_io(4096, d, 8 * d) / io.lower_bound(4096, d, 8 * d) for d in (64, 256, 1024)]
    assert all(later > 1.7 * earlier for earlier, later in pairwise(ratios))  # grows as √(d²/M)


@pytest.mark.parametrize("algorithm", STANDARD)
@pytest.mark.parametrize("n, d, M", [(48, 4, 24), (48, 8, 70), (60, 8, 300), (37, 5, 64), (64, 16, 96)])
def test_no_epoch_completes_more_than_the_counting_lemma_allows(algorithm, n, d, M):
    epochs = traces.progress(io.count(algorithm, n, d, M, trace=True))
    assert max(e.entries for e in epochs) <= io.most_entries(d, M)
    assert max(e.products for e in epochs) <= io.most_products(d, M)


@pytest.mark.parametrize("algorithm", STANDARD)
@pytest.mark.parametrize("n, d, M", [(48, 4, 24), (37, 5, 64)])
def test_epochs_hold_at_most_m_transfers_and_all_the_work(algorithm, n, d, M):
    fast = io.count(algorithm, n, d, M, trace=True)
    epochs = traces.progress(fast)
    assert max(e.io for e in epochs) <= M
    assert [sum(column) for column in zip(*epochs, strict=True)] == [fast.io, n * n, n * n * d]


def test_an_epoch_that_completes_too_much_would_be_seen():
    n, d = 32, 8
    fast = io.count(io.flash, n, d, n * (2 * d + 3) + 2 * d, trace=True)
    fast.capacity = 2 * n * d  # the trace of a large memory, judged as if it came from one that is smaller
    assert max(e.entries for e in traces.progress(fast)) > io.most_entries(d, n * d // 4)


def test_a_machine_that_only_counted_says_how_to_get_a_trace():
    with pytest.raises(ValueError, match="trace=True"):
        traces.progress(io.count(io.flash, 16, 4, 48))


def slope(function, n, d, sizes):
    words = [function(n, d, int(M)) for M in sizes]
    return np.polyfit(np.log(sizes), np.log(words), 1)[0]


def test_flash_falls_as_one_over_m():
    assert slope(io.flash_io, 4096, 64, np.geomspace(4096, 4096 * 8, 20)) == pytest.approx(-1, abs=0.1)


def test_the_small_cache_falls_as_one_over_the_root_of_m():
    assert slope(io.small_cache_io, 4096, 64, np.geomspace(64, 4096, 20)) == pytest.approx(-0.46, abs=0.06)


def test_without_storing_the_scores_the_small_cache_falls_as_the_root_alone():
    def rest(n, d, M):
        return io.small_cache_io(n, d, M) - 2 * n * n

    assert slope(rest, 4096, 64, np.geomspace(64, 4096, 20)) == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize("d", [64, 128])
def test_the_regimes_meet_at_a_constant_fraction_of_d_squared(d):
    fractions = [io.crossover(n, d) / d**2 for n in (1024, 4096)]
    assert 0.1 < fractions[0] < 0.6
    assert fractions[0] == pytest.approx(fractions[1], rel=0.05)


@pytest.mark.parametrize("n, d", [(64, 1), (100, 4), (256, 16), (1024, 32)])
def test_the_crossover_is_where_the_tiles_win_for_the_last_time(n, d):
    last = io.crossover(n, d)
    assert io.best(n, d, last) is io.small_cache
    assert all(io.best(n, d, M) is io.flash for M in range(last + 1, 4 * d * d + 16 * d))


# ---- fast multiplication and the replay game -------------------------------------------------------------------------


def multiplications(fast):
    """Scalar multiplications for q kᵀ, from the shapes in a trace."""
    shape, total = {}, 0
    for event in fast.trace:
        if event.kind == "load":
            name, where = event.what
            shape[event.blocks[0]] = fast.slow[name][where].shape
        elif event.kind == "compute" and event.what is add_products:
            (m, x), (n, _) = (shape[number] for number in event.blocks[1:])
            total += m * n * x
    return total


@pytest.mark.parametrize("n, d, M", [(32, 8, 64), (64, 8, 256), (30, 6, 100)])
def test_strassen_multiplies_seven_eighths_and_moves_no_less_than_the_bound(n, d, M):
    plain, strassen = (io.count(a, n, d, M, trace=True) for a in (io.small_cache, rivals.small_cache_strassen))
    assert multiplications(plain) == n * n * d
    assert multiplications(strassen) * 8 == 7 * n * n * d
    assert strassen.io >= io.lower_bound(n, d, M)


def test_strassen_refuses_odd_sizes():
    with pytest.raises(ShapeError, match="even sizes"):
        io.count(rivals.small_cache_strassen, 15, 4, 100)


@pytest.mark.parametrize("algorithm", STANDARD)
@pytest.mark.parametrize("n, d, M", [(16, 4, 24), (19, 3, 40)])
def test_bob_reproduces_every_score_from_the_transcript_alone(algorithm, n, d, M):
    q, k, v = normal(n, d)
    (fast,) = io.run(algorithm, q, k, v, M).machines
    game = traces.transcripts(fast)
    for transcript in game:
        for ours, theirs in zip(traces.reproduce(transcript), transcript.tiles, strict=True):
            assert_array_equal(ours, theirs)
    assert sum(transcript.entries for transcript in game) == n * n


@pytest.mark.parametrize("algorithm", STANDARD)
def test_bob_is_given_at_most_twice_the_words_of_fast_memory(algorithm):
    (fast,) = io.run(algorithm, *normal(19, 3), 40).machines
    assert max(transcript.words for transcript in traces.transcripts(fast)) <= 80


def test_alice_completes_the_scores_of_numpy():
    q, k, v = normal(16, 4)
    (fast,) = io.run(io.flash, q, k, v, 24).machines
    got = np.concatenate([tile.ravel() for transcript in traces.transcripts(fast) for tile in transcript.tiles])
    assert_allclose(np.sort(got), np.sort((q[0] @ k[0].T / 2).ravel()), rtol=0, atol=1e-14)


def test_bob_fails_when_one_word_of_his_transcript_is_wrong():
    (fast,) = io.run(io.flash, *normal(16, 4), 24).machines
    transcript = next(t for t in traces.transcripts(fast) if t.message and t.tiles)
    transcript.message[0].flat[0] += 1e-9
    pairs = zip(traces.reproduce(transcript), transcript.tiles, strict=True)
    assert any((ours != theirs).any() for ours, theirs in pairs)


# ---- caches that decide by themselves --------------------------------------------------------------------------------

HOW = st.sampled_from([caches.READ, caches.UPDATE, caches.CREATE])
TOUCHES = st.lists(st.tuples(st.integers(0, 7), HOW), min_size=1)


def as_trace(touches):
    word, how = zip(*touches, strict=True)
    return caches.Accesses(np.array(word), np.array(how), 8)


def fewest_reads(touches, capacity):
    """By trying every victim."""
    states = {frozenset(): 0}
    for word, how in touches:
        after = {}
        for held, reads in states.items():
            if word in held:
                choices = [(held, reads)]
            else:
                reads += how != caches.CREATE
                kept = [held - {victim} for victim in held] if len(held) == capacity else [held]
                choices = [(rest | {word}, reads) for rest in kept]
            for state, cost in choices:
                after[state] = min(cost, after.get(state, cost))
        states = after
    return min(states.values())


@settings(max_examples=150, deadline=None)
@given(TOUCHES, st.integers(1, 4))
def test_no_choice_of_victims_reads_less_than_belady(touches, capacity):
    assert caches.belady(as_trace(touches), capacity).reads == fewest_reads(touches, capacity)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.integers(1, 4))
def test_lru_reads_at_most_twice_what_belady_reads_with_half_the_room(words, half):
    trace = as_trace([(word, caches.READ) for word in words])  # Sleator and Tarjan 1985
    assert caches.lru(trace, 2 * half).reads <= 2 * caches.belady(trace, half).reads + half


def test_lru_by_hand():
    trace = as_trace([(0, caches.READ), (1, caches.UPDATE), (0, caches.READ), (2, caches.READ), (1, caches.READ)])
    assert caches.lru(trace, 2) == (4, 1)  # 2 evicts the changed 1, which comes back unchanged


def test_a_cache_as_large_as_all_words_moves_inputs_and_outputs_once():
    (fast,) = io.run(io.flash, *[like((1, 24, 4))] * 3, 60).machines
    trace = caches.accesses(fast)
    assert caches.lru(trace, 10_000) == caches.belady(trace, 10_000) == (3 * 24 * 4, 24 * 4)


@pytest.mark.parametrize("algorithm", [io.flash, io.flash_keys_outside, io.small_cache])
@pytest.mark.parametrize("n, d, M", [(48, 8, 64), (48, 8, 128)])
def test_lru_moves_at_most_three_times_the_words_of_explicit_control(algorithm, n, d, M):
    fast = io.count(algorithm, n, d, M, trace=True)
    trace = caches.accesses(fast)
    assert caches.belady(trace, M).io <= caches.lru(trace, M).io <= 3 * fast.io


# ---- the pebble game -------------------------------------------------------------------------------------------------


def fewest_by_plain_search(graph, most):
    """Every rule as it stands, breadth first over (red, blue); a transfer is one step."""
    nodes = range(len(graph.operands))
    inputs = frozenset(x for x in nodes if not graph.operands[x])
    start = frozenset(), inputs
    distance, queue = {start: 0}, deque([start])
    while queue:
        red, blue = state = queue.popleft()
        if graph.outputs <= blue:
            return distance[state]
        moves = [(0, red - {x}, blue) for x in red] + [(1, red, blue | {x}) for x in red - blue]
        if len(red) < most:
            moves += [(1, red | {x}, blue) for x in blue - red]
        for x in nodes:
            if graph.operands[x] and red >= set(graph.operands[x]):
                if len(red) < most:
                    moves.append((0, red | {x}, blue))
                moves += [(0, red - {y} | {x}, blue) for y in graph.operands[x]]
        for cost, *after in moves:
            if distance[state] + cost < distance.get(tuple(after), 1 << 30):
                distance[tuple(after)] = distance[state] + cost
                (queue.append if cost else queue.appendleft)(tuple(after))
    return None


@st.composite
def graphs(draw):
    operands = [(), ()]
    for x in range(2, draw(st.integers(3, 7))):
        operands.append(tuple(sorted(draw(st.sets(st.integers(0, x - 1), max_size=2)))))
    computed = [x for x, needs in enumerate(operands) if needs]
    outputs = draw(st.sets(st.sampled_from(computed), min_size=1)) if computed else set()
    return pebbles.Graph(tuple(operands), frozenset(outputs))


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 4))
def test_the_search_finds_what_plain_breadth_first_search_finds(graph, red):
    assert pebbles.fewest_transfers(graph, red) == fewest_by_plain_search(graph, red)


@pytest.mark.parametrize("red, algorithm", [(4, io.small_cache), (6, io.small_cache), (7, io.flash), (8, io.flash)])
def test_no_algorithm_moves_less_than_the_best_of_all_games(red, algorithm):
    game = pebbles.fewest_transfers(pebbles.attention_graph(2), red)
    assert io.lower_bound(2, 1, red) <= game <= io.count(algorithm, 2, 1, red).io


def test_seven_words_are_the_fewest_that_need_no_extra_transfer():
    graph = pebbles.attention_graph(2)
    assert [pebbles.fewest_transfers(graph, red) for red in (6, 7)] == [9, 8]  # 8 = inputs and outputs


def test_one_red_pebble_computes_nothing_of_two_operands():
    assert pebbles.fewest_transfers(pebbles.attention_graph(1), 1) is None


def test_a_search_that_grows_too_large_says_so():
    with pytest.raises(pebbles.SearchTooLarge, match="more than 100 states"):
        pebbles.fewest_transfers(pebbles.attention_graph(2), 4, most_states=100)
