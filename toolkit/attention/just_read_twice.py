"""Just read twice: a recurrent model that sees its prompt twice decides better what to keep in a state of fixed size.

A reader with a small memory must choose what to store before it knows what will be asked. Are two sets A and B, read
one after the other, disjoint? One reading stores A, however large. Two readings store the smaller set. Three parts:

1. `one_reading` and `two_readings` of a stream, every bit of memory charged (`_just_read_twice_memory`).
2. JRT-Prompt, `repeat`: context and question come more than once; the model is untouched.
3. JRT-RNN, prefix linear attention: the prompt is read without a causal mask by keys and values of its own, whose sum
   is added to BASED's state. Decoding is BASED's recurrence, on a state of the same size. Losses and the small models
   that are trained: `_just_read_twice_model`.

Where we differ. Padding: the published code sets padded keys to 0 before the feature map, and φ(0) = [1, 0, …], so pads
weigh 1; here their features are taken out of the sums. Counting: a list of items at ⌈log₂ n⌉ bits each is the paper's;
for a > n / ⌈log₂ n⌉ items a bitmap of n bits is smaller. No exact reader needs less than log₂ C(n, a) bits.
Source: Arora et al. 2024, arXiv 2407.05483, sections 3 and 4, and its code. Chapter: attention/just_read_twice.
"""

import numpy as np

from toolkit.kernels.linear_attention import state_shape
from toolkit.runtime.arrays import like
from toolkit.runtime.errors import ShapeError
from toolkit.runtime.kernel import Cost, kernel

from ._just_read_twice_memory import BoundedMemory, StateFull, bits_for, index_game
from .based import absorb, chunked, empty_state, linear_attention, linear_attention_backward, taylor_features

__all__ = [
    "SEPARATOR",
    "BoundedMemory",
    "StateFull",
    "bits_of_one_reading",
    "bits_of_two_readings",
    "encode",
    "index_game",
    "left_pad",
    "one_reading",
    "prefill",
    "prefix_linear_attention",
    "prefix_linear_attention_backward",
    "repeat",
    "seen",
    "shared_item",
    "stream_of",
    "two_readings",
]
SEPARATOR = -1  # ends a set in a stream

# ---- 1. two sets in a stream: is there an item in both? --------------------------------------------------------------


def one_reading(stream, memory):
    """Are A and B disjoint? Store A, then look up each item of B.

    stream   items of A, SEPARATOR, items of B, SEPARATOR; read once, from left to right
    memory   BoundedMemory
    returns  bool, always right
    raises   StateFull  A does not fit: see `bits_of_one_reading`
    """
    memory.reserve(COUNTERS_ONCE)
    part, met = 0, False
    for item in stream:
        if item == SEPARATOR:
            part += 1
        elif part == 0:
            memory.keep(item)
        else:
            met |= item in memory
    return not met


def two_readings(stream, memory):
    """Are A and B disjoint? Store A if it fits and look up B; if not, store B and look up the second copy of A.

    stream   A, B, A, B, each ended by SEPARATOR; nobody says how long they are
    memory   BoundedMemory
    returns  bool, always right
    raises   StateFull  neither fits: see `bits_of_two_readings`
    """
    memory.reserve(COUNTERS_TWICE)
    part, stored, met = 0, 0, False  # stored: the part whose items are in memory
    for item in stream:
        if item == SEPARATOR:
            part += 1
        elif part == stored:
            try:
                memory.keep(item)
            except StateFull:
                if part == 1:
                    raise
                memory.forget()
                stored = 1
        elif part == stored + 1:
            met |= item in memory
    return not met


COUNTERS_ONCE = bits_for(3) + 1  # part 0 … 2, met
COUNTERS_TWICE = bits_for(5) + 1 + 1  # part 0 … 4, stored, met


def bits_of_one_reading(a, b, universe):
    """What `one_reading` needs: |A| ⌈log₂ n⌉ and its counters, whatever b."""
    return a * bits_for(universe) + bits_for(universe + 1) + COUNTERS_ONCE


def bits_of_two_readings(a, b, universe):
    """What `two_readings` needs: min(|A|, |B|) ⌈log₂ n⌉ and its counters."""
    return min(a, b) * bits_for(universe) + bits_for(universe + 1) + COUNTERS_TWICE


def shared_item(first, second, keys, readings=1, room=16):
    """The same two readers with BASED's state in place of the list: it never raises, it gets it wrong instead.

    first, second   lists of items; one is in both
    keys            (universe, d'): an item is stored as φ of its key, and looked up by its product with the state
    readings        1: store the first set. 2: drop it if it has more than `room` items, and store the second
    returns         the item of the other set with the largest weight
    """
    stored, looked_up = (first, second) if _times(readings) == 1 or len(first) <= room else (second, first)
    held = keys[None, stored]
    state = absorb(empty_state(held, held), held, held)
    weights = (taylor_features(keys[looked_up]) @ state[0])[:, -1]  # the last column sums the features alone
    return looked_up[int(np.argmax(weights))]


def stream_of(*sets, readings=1):
    """The items of each set and a SEPARATOR after it; all of it `readings` times."""
    once = [item for items in sets for item in (*items, SEPARATOR)]
    return iter(once * _times(readings))


# ---- 2. JRT-Prompt ---------------------------------------------------------------------------------------------------


def repeat(context, question, times=2):
    """context ‖ question, `times` times over: every order of the information has been seen when the answer is due.

    context   (…, c) token ids          question  (…, m) token ids
    returns   (…, times · (c + m))
    raises    ValueError  times below 1
    """
    return np.concatenate([context, question] * _times(times), axis=-1)


def _times(times):
    if times < 1:
        raise ValueError(f"a prompt is read {times} times: give 1 (as it is), 2 (just read twice) or more")
    return times


# ---- 3. JRT-RNN: prefix linear attention -----------------------------------------------------------------------------


def prefix_linear_attention(q, k, v, k_enc, v_enc, keep=None):
    """Each query sees the keys up to its own, and all keys of the encoder. Quadratic view, for training.

    q, k          (heads, tokens, d')      v      (heads, tokens, d)
    k_enc         (heads, M, d')           v_enc  (heads, M, d): projections of the first M tokens, the prompt
    keep          (…, tokens), 0 for padding; None: all count
    returns       (heads, tokens, d); one normaliser for both sums
    raises        ShapeError
    """
    return linear_attention(q, *_extended(k, v, k_enc, v_enc), seen(k, k_enc, keep))


def prefix_linear_attention_backward(q, k, v, k_enc, v_enc, out, grad_out, keep=None):
    """Gradients (dq, dk, dv, dk_enc, dv_enc): BASED's, for keys ‖ encoder keys under the mask [tril | ones]."""
    keys_and_values, mask = _extended(k, v, k_enc, v_enc), seen(k, k_enc, keep)
    dq, *both = linear_attention_backward(q, *keys_and_values, out, grad_out, mask)
    (dk, dk_enc), (dv, dv_enc) = (np.split(d, [k.shape[-2]], axis=-2) for d in both)
    return dq, dk, dv, dk_enc, dv_enc


def seen(k, k_enc, keep=None):
    """The mask [tril | ones], (…, tokens, tokens + M), without padded keys."""
    tokens, prefix = _lengths(k, k_enc)
    mask = np.concatenate([np.tri(tokens), np.ones((tokens, prefix))], axis=-1)
    if keep is None:
        return mask
    return mask * np.concatenate([keep, keep[..., :prefix]], axis=-1)[..., None, :]


def prefill(q, k, v, k_enc, v_enc, keep=None, chunk=64):
    """Read the prompt: the encoder's sum S_e, which knows no order; from there BASED's chunked prefill, to S_e + S_c.

    arguments  as in `prefix_linear_attention`
    chunk      tokens in a chunk
    returns    (out (heads, tokens, d), state (heads, D̃, d + 1)); decode with `based.recurrent(q, k, v, state)`
    raises     ShapeError
    """
    _, prefix = _lengths(k, k_enc)
    state = encode(k_enc, v_enc, None if keep is None else keep[..., :prefix])
    return chunked(q, k, v, chunk, state, keep)


def _encode_cost(k_enc, v_enc, keep=None):
    state = like(state_shape(k_enc, v_enc), v_enc.dtype)
    mask = 0 if keep is None else keep.nbytes
    return Cost(2 * k_enc.shape[-2] * state.size, k_enc.nbytes + v_enc.nbytes + mask + state.nbytes)


@kernel(cost=_encode_cost, out=lambda k_enc, v_enc, keep=None: like(state_shape(k_enc, v_enc), v_enc.dtype))
def encode(k_enc, v_enc, keep=None):
    """S_e = Σ φ(k_enc) [v_enc | 1]ᵀ over the whole prompt: (heads, D̃, d + 1).

    costs  2 M D̃ (d + 1) flops a head; reads k_enc and v_enc once, the state stays in fast memory until the end
    """
    return absorb(empty_state(k_enc, v_enc), k_enc, v_enc, keep)


def left_pad(prompt, length, pad=0, truncate=False):
    """A prompt at the end of `length` places, as the encoder was trained to see it.

    prompt    (n,) token ids
    truncate  a longer prompt loses its beginning; without it, it is refused
    returns   (tokens (length,), keep (length,) float: 0 for padding)
    raises    ShapeError
    """
    prompt = np.asarray(prompt)
    if len(prompt) > length and not truncate:
        raise ShapeError(
            f"the prompt has {len(prompt)} tokens and the encoder {length} places; raise the length, or give "
            "truncate=True to keep the last ones"
        )
    prompt = prompt[max(0, len(prompt) - length) :]
    padding = length - len(prompt)
    return np.concatenate([np.full(padding, pad, prompt.dtype), prompt]), (np.arange(length) >= padding).astype(float)


def _extended(k, v, k_enc, v_enc):
    return np.concatenate([k, k_enc], axis=-2), np.concatenate([v, v_enc], axis=-2)


def _lengths(k, k_enc):
    tokens, prefix = k.shape[-2], k_enc.shape[-2]
    if prefix > tokens:
        raise ShapeError(f"an encoder of {prefix} tokens on a sequence of {tokens}; left-pad the prompt or cut k_enc")
    return tokens, prefix
