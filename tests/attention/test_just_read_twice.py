"""Just read twice: readers right to the bit, prefix linear attention by its formula, no look at what is to come."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
import torch
from autograd import grad
from hypothesis import given, settings
from hypothesis import strategies as some
from numpy.testing import assert_allclose, assert_array_equal

from toolkit.attention import _just_read_twice_memory as memory
from toolkit.attention import _just_read_twice_model as small
from toolkit.attention import based
from toolkit.attention import just_read_twice as jrt
from toolkit.claims.attention import just_read_twice as claims
from toolkit.learn.optimise import flat
from toolkit.learn.two_lists import overlapping_lists
from toolkit.runtime import like
from toolkit.runtime.errors import ShapeError

UNIVERSE = 2048
SIZES = [(4, 16), (8, 32), (64, 16), (4, 128), (16, 256), (4, 256)]
SIZES += [(b, a) for a, b in SIZES]  # the paper's twelve
READERS = [(jrt.one_reading, jrt.bits_of_one_reading, 1), (jrt.two_readings, jrt.bits_of_two_readings, 2)]
ONCE_AND_TWICE = pytest.mark.parametrize("reader, bits_needed, readings", READERS, ids=["one reading", "two readings"])


def two_sets(a, b, common, universe=UNIVERSE, seed=0):
    """Sets of a and b items with `common` in both."""
    items = np.random.default_rng(seed).permutation(universe)[: a + b - common].tolist()
    return items[:a], items[a - common :]


# ---- 1. readers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("common", [0, 1, 3])
@pytest.mark.parametrize("a, b", SIZES)
@ONCE_AND_TWICE
def test_with_the_bits_of_its_formula_a_reader_is_right(reader, bits_needed, readings, a, b, common):
    sets = two_sets(a, b, common, seed=a)
    notes = jrt.BoundedMemory(bits_needed(a, b, UNIVERSE), UNIVERSE)
    assert reader(jrt.stream_of(*sets, readings=readings), notes) == (common == 0)


@pytest.mark.parametrize("a, b", SIZES)
@ONCE_AND_TWICE
def test_one_bit_less_is_refused(reader, bits_needed, readings, a, b):
    notes = jrt.BoundedMemory(bits_needed(a, b, UNIVERSE) - 1, UNIVERSE)
    with pytest.raises(jrt.StateFull, match="do not fit"):
        reader(jrt.stream_of(*two_sets(a, b, 1), readings=readings), notes)


@pytest.mark.parametrize("a, b", SIZES)
def test_one_reading_pays_for_the_first_set_and_two_for_the_smaller(a, b):
    """The paper's |A| log n and min(|A|, |B|) log n; 12 bits count the items, 3 and 5 say where the reader is."""
    assert jrt.bits_of_one_reading(a, b, UNIVERSE) == 11 * a + 12 + 3
    assert jrt.bits_of_two_readings(a, b, UNIVERSE) == 11 * min(a, b) + 12 + 5


@given(a=some.integers(0, 12), b=some.integers(0, 12), bits=some.integers(0, 90), data=some.data())
@settings(max_examples=200, deadline=None)
def test_a_reader_that_does_not_raise_is_right(a, b, bits, data):
    first, second = (data.draw(some.sets(some.integers(0, 12), min_size=n, max_size=n)) for n in (a, b))
    for reader, bits_needed, readings in READERS:
        try:
            said = reader(jrt.stream_of(first, second, readings=readings), jrt.BoundedMemory(bits, 13))
        except jrt.StateFull:
            assert bits < bits_needed(a, b, 13)
        else:
            assert bits >= bits_needed(a, b, 13)
            assert said == first.isdisjoint(second)


@given(a=some.integers(0, 300), b=some.integers(0, 300))
def test_two_readings_do_not_care_about_the_order(a, b):
    assert jrt.bits_of_two_readings(a, b, UNIVERSE) == jrt.bits_of_two_readings(b, a, UNIVERSE)


@given(a=some.integers(1, 300), b=some.integers(0, 300), bits=some.integers(0, 4000))
def test_what_one_reading_can_do_two_can_do_with_two_more_bits_of_counters(a, b, bits):
    extra = jrt.COUNTERS_TWICE - jrt.COUNTERS_ONCE
    assert extra == 2
    if jrt.bits_of_one_reading(a, b, UNIVERSE) <= bits:
        assert jrt.bits_of_two_readings(a, b, UNIVERSE) <= bits + extra


def test_after_a_full_memory_two_readings_hold_the_second_set_only():
    notes = jrt.BoundedMemory(jrt.bits_of_two_readings(9, 2, 64), 64)
    jrt.two_readings(jrt.stream_of(range(9), [40, 41], readings=2), notes)
    assert notes.items == [40, 41]


@pytest.mark.parametrize("n, a", [(6, 2), (7, 3), (8, 4)])
def test_a_reader_that_is_always_right_has_a_state_for_every_first_set(n, a):
    """The floor log₂ C(n, a): two sets with equal states would get equal answers for every B, and one differs."""
    states = set()
    for items in combinations(range(n), a):
        notes = jrt.BoundedMemory(10_000, n)
        jrt.one_reading(jrt.stream_of(items, []), notes)
        states.add(tuple(notes.items))
    assert len(states) == comb(n, a)
    assert a * memory.bits_for(n) >= np.log2(comb(n, a))


@pytest.mark.parametrize("values, bits", [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (2048, 11), (2049, 12)])
def test_bits_are_the_logarithm_rounded_up(values, bits):
    assert memory.bits_for(values) == bits


@pytest.mark.parametrize("item", [-2, 8])
def test_an_item_outside_the_universe_is_refused_by_number(item):
    with pytest.raises(ValueError, match=f"item {item} is not in the universe 0 … 7"):
        jrt.BoundedMemory(100, 8).keep(item)


def test_a_universe_of_one_item_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        jrt.BoundedMemory(100, 1)


# ---- INDEX -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 5, 7, 8, 16, 29])
@pytest.mark.parametrize("sketch", [memory.as_list, memory.as_bitmap, memory.as_bloom])
def test_no_memory_beats_the_bound_on_index(sketch, bits):
    game = jrt.index_game(*sketch(8, bits), memory.all_strings(8))
    assert game.bits == bits >= game.floor


@given(bits=some.integers(1, 24), hashes=some.integers(1, 4), seed=some.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_no_bloom_filter_beats_the_bound_on_index(bits, hashes, seed):
    game = jrt.index_game(*memory.as_bloom(6, bits, hashes, seed), memory.all_strings(6))
    assert bits >= game.floor


@given(bits=some.integers(0, 4), data=some.data())
@settings(max_examples=60, deadline=None)
def test_the_best_bob_for_any_alice_does_not_beat_the_bound(bits, data):
    """Any map of 2⁴ strings to 2^bits messages; Bob answers as most strings behind a message say."""
    strings = memory.all_strings(4)
    sent = data.draw(some.lists(some.integers(0, 2**bits - 1), min_size=16, max_size=16))
    best = {m: strings[np.array(sent) == m].mean(axis=0) > 0.5 for m in set(sent)}
    code = {tuple(np.flatnonzero(x)): m for x, m in zip(strings, sent, strict=True)}

    def write(items):
        return [code[tuple(items)] >> place & 1 for place in range(bits)]

    def read(message, i):
        return best[sum(int(bit) << place for place, bit in enumerate(message))][i]

    game = jrt.index_game(write, read, strings)
    assert bits >= game.floor - 1e-12


def test_the_bound_is_tight_for_a_bitmap():
    game = jrt.index_game(*memory.as_bitmap(8, 8), memory.all_strings(8))
    assert (game.bits, game.error, game.floor) == (8, 0, 8)


def test_a_bob_who_peeks_is_caught():
    peeked = {}

    def write(items):
        peeked["items"] = items
        return np.zeros(3, np.uint8)

    game = jrt.index_game(write, lambda message, i: i in peeked["items"], memory.all_strings(8))
    assert game.bits < game.floor


def test_a_list_keeps_as_many_items_as_a_bounded_memory_without_counters():
    write, read = memory.as_list(64, 40)
    notes = jrt.BoundedMemory(40, 64)
    with pytest.raises(jrt.StateFull):
        for item in range(64):
            notes.keep(item)
    assert [i for i in range(64) if read(write(list(range(64))), i)] == notes.items


def test_messages_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="same number of bits"):
        jrt.index_game(lambda items: np.zeros(len(items)), lambda message, i: False, memory.all_strings(3))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_entropy_is_scipys(p):
    from scipy.stats import entropy

    assert_allclose(memory.entropy(p), entropy([p, 1 - p], base=2), atol=1e-12)


# ---- 2. JRT-Prompt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times, prompt", [(1, [5, 6, 7, 3]), (2, [5, 6, 7, 3] * 2), (3, [5, 6, 7, 3] * 3)])
def test_context_and_question_are_repeated_together(times, prompt):
    assert_array_equal(jrt.repeat([5, 6, 7], [3], times), prompt)


@pytest.mark.parametrize("call", [lambda: jrt.repeat([1], [2], 0), lambda: jrt.stream_of([1], [2], readings=0)])
def test_reading_less_than_once_is_refused(call):
    with pytest.raises(ValueError, match="read 0 times: give 1"):
        call()


# ---- 3. prefix linear attention --------------------------------------------------------------------------------------

HEADS, TOKENS, PREFIX, FEATURE, WIDTH = 2, 24, 15, 4, 6


def arrays(seed=0, tokens=TOKENS, prefix=PREFIX):
    """q, k, v, k_enc, v_enc, grad_out in float64."""
    random = np.random.default_rng(seed)
    shapes = [(tokens, FEATURE)] * 2 + [(tokens, WIDTH), (prefix, FEATURE), (prefix, WIDTH), (tokens, WIDTH)]
    return [random.standard_normal((HEADS, *shape)) for shape in shapes]


def by_the_formula(q, k, v, k_enc, v_enc):
    """The paper's sums, one query at a time, with 1 + z + z²/2 written out."""

    def weight(query, key):
        z = query @ key / np.sqrt(FEATURE)
        return 1 + z + z**2 / 2

    out = np.empty_like(v)
    for h, i in product(range(HEADS), range(q.shape[1])):
        pairs = [(k[h, j], v[h, j]) for j in range(i + 1)] + list(zip(k_enc[h], v_enc[h], strict=True))
        weights = [weight(q[h, i], key) for key, _ in pairs]
        out[h, i] = sum(w * value for w, (_, value) in zip(weights, pairs, strict=True)) / sum(weights)
    return out


def in_torch(q, k, v, k_enc, v_enc, grad_out):
    """Gradients by torch's autograd, from features and two separate sums under one denominator."""
    leaves = [torch.tensor(a, requires_grad=True) for a in (q, k, v, k_enc, v_enc)]

    def features(x):
        pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2 * FEATURE) ** 0.5
        return torch.cat([torch.ones_like(x[..., :1]), x / FEATURE**0.25, pairs], -1)

    fq, fk, fe = (features(leaves[i]) for i in (0, 1, 3))
    causal = torch.tril(fq @ fk.mT)
    across = fq @ fe.mT
    out = (causal @ leaves[2] + across @ leaves[4]) / (causal.sum(-1) + across.sum(-1))[..., None]
    (out * torch.tensor(grad_out)).sum().backward()
    return [leaf.grad.numpy() for leaf in leaves]


def test_equals_the_papers_formula():
    *inputs, _ = arrays()
    assert_allclose(jrt.prefix_linear_attention(*inputs), by_the_formula(*inputs), atol=1e-12)


def test_an_encoder_sum_that_stops_at_the_query_is_caught():
    """The classic mistake: BASED twice. It differs by far more than the tolerance of the test above."""
    q, k, v, k_enc, v_enc, _ = arrays()
    mask = np.concatenate([np.tri(TOKENS), np.tri(TOKENS)[:, :PREFIX]], axis=1)
    keys, values = np.concatenate([k, k_enc], 1), np.concatenate([v, v_enc], 1)
    wrong = based.linear_attention(q, keys, values, mask)
    assert np.abs(wrong - by_the_formula(q, k, v, k_enc, v_enc)).max() > 0.1


def test_gradients_equal_torchs():
    *inputs, grad_out = arrays(1)
    out = jrt.prefix_linear_attention(*inputs)
    ours = jrt.prefix_linear_attention_backward(*inputs, out, grad_out)
    for mine, theirs in zip(ours, in_torch(*inputs, grad_out), strict=True):
        assert_allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("changed", range(5), ids=["q", "k", "v", "k_enc", "v_enc"])
def test_gradients_agree_with_finite_differences(changed):
    *inputs, grad_out = arrays(2)
    along = np.random.default_rng(3).standard_normal(inputs[changed].shape)

    def loss(step):
        moved = [a + step * along if i == changed else a for i, a in enumerate(inputs)]
        return np.vdot(jrt.prefix_linear_attention(*moved), grad_out)

    gradient = jrt.prefix_linear_attention_backward(*inputs, jrt.prefix_linear_attention(*inputs), grad_out)[changed]
    assert np.vdot(gradient, along) == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-7)


def test_without_an_encoder_it_is_based():
    q, k, v, *_ = arrays()
    none = k[:, :0], v[:, :0]
    assert_allclose(jrt.prefix_linear_attention(q, k, v, *none), based.linear_attention(q, k, v), atol=1e-12)


def test_with_the_encoders_features_out_of_the_sums_it_is_based():
    q, k, v, k_enc, v_enc, _ = arrays()
    state = jrt.encode(k_enc, v_enc, keep=np.zeros(PREFIX))
    assert_allclose(based.chunked(q, k, v, state=state)[0], based.linear_attention(q, k, v), atol=1e-12)


def test_with_the_causal_keys_out_of_the_sums_it_is_attention_without_a_mask():
    q, _, _, k_enc, v_enc, _ = arrays()
    out = based.read(jrt.encode(k_enc, v_enc), q)
    unmasked = based.linear_attention(q, k_enc, v_enc, np.ones((TOKENS, PREFIX)))
    assert_allclose(out, unmasked, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_prefill_and_decode_equal_the_parallel_form(chunk):
    q, k, v, k_enc, v_enc, _ = arrays(4)
    prompt = [a[:, :PREFIX] for a in (q, k, v)]
    out, state = jrt.prefill(*prompt, k_enc, v_enc, chunk=chunk)
    rest, _ = based.recurrent(*(a[:, PREFIX:] for a in (q, k, v)), state)
    whole = jrt.prefix_linear_attention(q, k, v, k_enc, v_enc)
    assert_allclose(np.concatenate([out, rest], axis=1), whole, atol=1e-9)


def test_the_state_to_decode_from_has_as_many_bytes_as_baseds():
    q, k, v, k_enc, v_enc, _ = arrays()
    _, ours = jrt.prefill(q, k, v, k_enc, v_enc)
    _, theirs = based.chunked(q, k, v)
    features = 1 + FEATURE + FEATURE**2
    assert ours.nbytes == theirs.nbytes == HEADS * features * (WIDTH + 1) * 8


@pytest.mark.parametrize("tokens", [15, 60, 240])
def test_the_state_does_not_grow_with_the_prompt(tokens):
    q, k, v, k_enc, v_enc, _ = arrays(tokens=tokens, prefix=tokens)
    assert jrt.prefill(q, k, v, k_enc, v_enc)[1].shape == (HEADS, 1 + FEATURE + FEATURE**2, WIDTH + 1)


def test_the_encoders_sum_knows_no_order():
    *_, k_enc, v_enc, _ = arrays()
    order = np.random.default_rng(5).permutation(PREFIX)
    assert_allclose(jrt.encode(k_enc[:, order], v_enc[:, order]), jrt.encode(k_enc, v_enc), atol=1e-12)


def test_the_causal_sums_inside_the_prompt_do():
    q, k, v, k_enc, v_enc, _ = arrays()
    order = np.r_[np.random.default_rng(5).permutation(PREFIX), PREFIX:TOKENS]
    moved = jrt.prefix_linear_attention(q, k[:, order], v[:, order], k_enc, v_enc)
    difference = np.abs(moved - jrt.prefix_linear_attention(q, k, v, k_enc, v_enc)).max(axis=(0, 2))
    assert (difference[: PREFIX - 1] > 1e-3).all()
    assert (difference[PREFIX - 1 :] < 1e-12).all()


def moved_by(token, attention):
    """Largest change of each output when the key and value of one token of the prompt change."""
    *inputs, _ = arrays()
    before = attention(*inputs)
    for array in inputs[1:]:
        array[:, token] += 1
    return np.abs(attention(*inputs) - before).max(axis=(0, 2))


def test_an_earlier_output_in_the_prompt_sees_a_later_token():
    assert (moved_by(9, jrt.prefix_linear_attention)[:9] > 1e-3).all()


def test_in_based_it_does_not():
    assert (moved_by(9, lambda q, k, v, *_: based.linear_attention(q, k, v))[:9] == 0).all()


def test_no_output_sees_a_later_token_of_the_answer():
    changed = moved_by_decoder_token(18)
    assert (changed[:18] == 0).all()
    assert (changed[18:] > 0).all()


def moved_by_decoder_token(token):
    q, k, v, k_enc, v_enc, _ = arrays()
    before = jrt.prefix_linear_attention(q, k, v, k_enc, v_enc)
    k[:, token] += 1
    v[:, token] += 1
    return np.abs(jrt.prefix_linear_attention(q, k, v, k_enc, v_enc) - before).max(axis=(0, 2))


# ---- padding ---------------------------------------------------------------------------------------------------------


def padded(pads):
    """(arrays with `pads` random tokens before the prompt, keep, the arrays without)."""
    inputs = arrays(6)[:5]
    noise = arrays(7)[:5]
    return [np.concatenate([b[:, :pads], a], axis=1) for a, b in zip(inputs, noise, strict=True)], inputs


@pytest.mark.parametrize("pads", [1, 5, 9])
def test_left_padding_changes_nothing(pads):
    longer, inputs = padded(pads)
    keep = np.r_[np.zeros(pads), np.ones(TOKENS)]
    out = jrt.prefix_linear_attention(*longer, keep=keep)
    assert_allclose(out[:, pads:], jrt.prefix_linear_attention(*inputs), atol=1e-10)


@pytest.mark.parametrize("pads", [1, 5, 9])
def test_left_padding_changes_nothing_in_the_state(pads):
    longer, inputs = padded(pads)
    keep = np.r_[np.zeros(pads), np.ones(TOKENS)]
    assert_allclose(jrt.prefill(*longer, keep=keep)[1], jrt.prefill(*inputs)[1], atol=1e-10)


def test_zeroing_padded_keys_alone_is_not_enough():
    """What the published code does: φ(0) = [1, 0, …], so pads still weigh 1."""
    (q, k, v, k_enc, v_enc), inputs = padded(5)
    k[:, :5] = k_enc[:, :5] = 0
    out = jrt.prefix_linear_attention(q, k, v, k_enc, v_enc)
    assert np.abs(out[:, 5:] - jrt.prefix_linear_attention(*inputs)).max() > 0.1


def test_padding_gets_no_gradient():
    longer, _ = padded(5)
    keep = np.r_[np.zeros(5), np.ones(TOKENS)]
    out = jrt.prefix_linear_attention(*longer, keep=keep)
    grad_out = np.random.default_rng(8).standard_normal(out.shape) * keep[:, None]
    gradients = jrt.prefix_linear_attention_backward(*longer, out, grad_out, keep=keep)
    assert all((gradient[:, :5] == 0).all() for gradient in gradients)


def test_a_short_prompt_is_padded_on_the_left():
    tokens, keep = jrt.left_pad([7, 8, 9], 5)
    assert_array_equal(tokens, [0, 0, 7, 8, 9])
    assert_array_equal(keep, [0, 0, 1, 1, 1])


def test_a_long_prompt_is_refused_with_both_numbers():
    with pytest.raises(ShapeError, match="9 tokens and the encoder 5 places"):
        jrt.left_pad(range(9), 5)


def test_a_long_prompt_loses_its_beginning_when_asked():
    tokens, keep = jrt.left_pad(range(9), 5, truncate=True)
    assert_array_equal(tokens, [4, 5, 6, 7, 8])
    assert keep.all()


def test_an_encoder_longer_than_the_sequence_is_refused():
    with pytest.raises(ShapeError, match="encoder of 15 tokens on a sequence of 10"):
        jrt.prefix_linear_attention(*arrays(tokens=10)[:5])


# ---- a Taylor state in place of the list -----------------------------------------------------------------------------


def random_keys(count, feature=16):
    keys = np.random.default_rng(count).standard_normal((count, feature))
    return 10 * keys / np.linalg.norm(keys, axis=1, keepdims=True)


@pytest.mark.parametrize("readings", [1, 2])
def test_the_state_finds_the_shared_item_by_its_weight_in_the_sum(readings):
    """Judge: the weights 1 + z + z²/2 summed over the stored keys, written out."""
    first, second = list(range(30)), list(range(29, 40))
    keys = random_keys(40)
    stored, asked = (first, second) if readings == 1 else (second, first)  # 30 items are more than the room of 16
    z = keys[asked] @ keys[stored].T / 4
    best = asked[int((1 + z + z**2 / 2).sum(axis=1).argmax())]
    assert jrt.shared_item(first, second, keys, readings) == best


def test_two_readings_rescue_a_state_that_one_reading_fills():
    assert claims.found(256, 4, 1) < 0.7 < 0.9 < claims.found(256, 4, 2)


# ---- the task, the loss, the models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [(1, 1), (4, 32), (32, 4), (10, 3)])
def test_two_lists_share_the_answer_and_nothing_else(first, second):
    tokens = overlapping_lists(np.random.default_rng(0), 50, first, second, 68)
    assert tokens.shape == (50, first + second + 4)
    assert (tokens[:, [0, first + 1, -2]] == [1, 2, 3]).all()
    for row in tokens:
        one, other = set(row[1 : first + 1]), set(row[first + 2 : -2])
        assert one & other == {row[-1]}
        assert (len(one), len(other)) == (first, second)


def test_a_list_longer_than_half_of_the_items_is_refused():
    with pytest.raises(ShapeError, match="lists of 33 and 4 items: each needs 1 to 32"):
        overlapping_lists(np.random.default_rng(0), 2, 33, 4, 68)


@pytest.mark.parametrize("readings", [1, 2, 3])
def test_the_prompt_is_repeated_with_its_question_and_answered_once(readings):
    model = small.Model("linear", readings=readings)
    tokens, prefix = small.read_lists(np.random.default_rng(0), model, 4, 5, 3)
    assert tokens.shape == (4, 11 * readings + 1)
    assert prefix == 11 * readings - 1  # the last question is the first token after the prompt
    assert_array_equal(tokens[:, :11], tokens[:, 11 * (readings - 1) : -1])


KINDS = pytest.mark.parametrize("kind", ["linear", "prefix linear", "softmax", "prefix softmax"])
TASK_PREFIX = 9


def task(kind):
    """(params in float64, model, random tokens (2, 14)): a prompt of nine, then five."""
    random, model = np.random.default_rng(3), small.Model(kind)
    return small.fresh(random, model, "float64"), model, random.integers(4, 68, (2, 14))


@KINDS
@pytest.mark.parametrize("place", [9, 11])
def test_no_later_token_reaches_the_loss_of_an_answer(kind, place):
    """Gradient with respect to what stands at each place, from the next-token loss up to `place`: 0 beyond, exactly."""
    params, model, tokens = task(kind)

    def up_to(vectors):
        places = np.arange(28).reshape(2, 14)  # every place has a row of its own in the table
        scores = small.predict(params | {"embedding": vectors}, model, places[:, :-1], TASK_PREFIX)
        return small.loss(scores[:, : place + 1], tokens[:, : place + 2], TASK_PREFIX)

    gradient = grad(up_to)(params["embedding"][tokens].reshape(28, -1)).reshape(2, 14, -1)
    assert (gradient[:, place + 1 :] == 0).all()
    assert (np.abs(gradient[:, : place + 1]).max(axis=(0, 2)) > 0).all()


@pytest.mark.parametrize(
    "kind, sees", [("linear", False), ("softmax", False), ("prefix linear", True), ("prefix softmax", True)]
)
def test_only_prefix_models_look_ahead_inside_the_prompt(kind, sees):
    params, model, tokens = task(kind)
    moved = tokens.copy()
    moved[:, 7] = 4 + (tokens[:, 7] - 3) % 64
    difference = np.abs(small.predict(params, model, moved, 9) - small.predict(params, model, tokens, 9)).max(
        axis=(0, 2)
    )
    assert (difference[:7] > 0).all() if sees else (difference[:7] == 0).all()


def in_torch_loss(scores, tokens, prefix, hidden, weight):
    scores, tokens = torch.tensor(scores), torch.tensor(tokens)
    next_token = torch.nn.functional.cross_entropy(scores[:, prefix:].flatten(0, 1), tokens[:, prefix + 1 :].flatten())
    chosen = torch.tensor(hidden)
    return next_token + weight * torch.nn.functional.cross_entropy(scores[chosen], tokens[:, :-1][chosen])


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_is_torchs_next_token_loss_and_a_quarter_of_the_masked_one(weight):
    random = np.random.default_rng(4)
    tokens, scores = random.integers(4, 68, (6, 14)), random.standard_normal((6, 13, 68))
    _, hidden = small.hide(random, tokens[:, :-1], TASK_PREFIX, 0.3)
    ours = small.loss(scores, tokens, TASK_PREFIX, hidden, weight)
    assert ours == pytest.approx(in_torch_loss(scores, tokens, TASK_PREFIX, hidden, weight).item(), rel=1e-12)


def test_tokens_of_the_prompt_get_no_next_token_loss():
    random = np.random.default_rng(5)
    tokens, scores = random.integers(4, 68, (2, 14)), random.standard_normal((2, 13, 68))
    gradient = grad(lambda s: small.loss(s, tokens, TASK_PREFIX))(scores)
    assert (gradient[:, :TASK_PREFIX] == 0).all()
    assert (gradient[:, TASK_PREFIX:] != 0).all()


def test_a_share_of_the_prompt_is_hidden_and_nothing_else():
    tokens = np.full((400, 40), 5)
    shown, hidden = small.hide(np.random.default_rng(0), tokens, 30)
    assert_array_equal(shown == 0, hidden)
    assert not hidden[:, 30:].any()
    assert hidden[:, :30].mean() == pytest.approx(0.15, abs=0.01)


def test_a_hidden_token_after_the_prompt_is_refused():
    hidden = np.zeros((2, 13), bool)
    hidden[1, 10] = True
    with pytest.raises(ShapeError, match="1 tokens after the prompt of 9 are hidden"):
        small.loss(np.zeros((2, 13, 68)), np.zeros((2, 14), int), 9, hidden)


def test_a_prompt_that_leaves_nothing_to_predict_is_refused():
    with pytest.raises(ShapeError, match="prompt of 13 tokens leaves nothing"):
        small.loss(np.zeros((2, 13, 68)), np.zeros((2, 14), int), 13)


@pytest.mark.parametrize("name", ["once", "once, larger state", "twice", "prefix", "softmax", "prefix softmax"])
def test_a_shipped_model_does_far_better_than_guessing(name):
    model, params = small.trained(name)
    assert small.accuracy(params, model, 4, 8, batch=128) > 0.8  # a guess among the first list: 1/4


def test_the_prefix_model_holds_as_much_as_the_causal_one_and_softmax_grows():
    once, prefix, softmax = (small.trained(name)[0] for name in ("once", "prefix", "softmax"))
    assert once.state_floats(10) == once.state_floats(1000) == prefix.state_floats(1000) == 2 * 2 * 21 * 17
    assert softmax.state_floats(1000) == 100 * softmax.state_floats(10)


def test_an_unknown_model_is_refused_with_the_names():
    with pytest.raises(ValueError, match="no trained model 'thrice'; there are once, "):
        small.trained("thrice")


def test_models_come_back_as_they_were_saved(tmp_path, monkeypatch):
    model = small.Model("prefix linear", 3)
    params = small.fresh(np.random.default_rng(0), model)
    small.save(tmp_path / "some.npz", {"x": (model, params)})
    monkeypatch.setattr(small, "SHIPPED", tmp_path / "some.npz")
    again, loaded = small.trained.__wrapped__("x")
    assert again == model
    assert_allclose(flat(loaded), flat(params), rtol=1e-3, atol=1e-6)


# ---- by shape --------------------------------------------------------------------------------------------------------


def test_prefill_without_data_costs_what_its_sums_cost():
    """Encoder: every prompt token adds D̃ (d + 1) products to the state, two flops each."""
    cost = jrt.encode.cost(np.ones((2, 10, 4)), np.ones((2, 10, 6)))
    assert cost.flops == 2 * 2 * 10 * 21 * 7
    assert cost.bytes == 8 * 2 * (10 * 4 + 10 * 6 + 21 * 7)


def test_shape_only_prefill_has_the_shapes_of_the_real_one():
    inputs = [a[:, :PREFIX] for a in arrays()[:5]]
    real, empty = jrt.prefill(*inputs), jrt.prefill(*(like(a) for a in inputs))
    assert [a.shape for a in real] == [a.shape for a in empty]


def test_twice_the_prompt_takes_a_state_twice_and_softmax_four_times():
    state = claims.prefill_seconds(claims.read_with_state, 65_536) / claims.prefill_seconds(
        claims.read_with_state, 32_768
    )
    assert state == pytest.approx(2, rel=0.01)
    assert claims.attention_seconds(65_536) / claims.attention_seconds(32_768) == pytest.approx(4, rel=0.01)
