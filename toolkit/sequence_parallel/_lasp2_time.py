"""How long LASP-1's and LASP-2's forward pass takes, in closed form: what the virtual machine gives to rounding.

Chapter: sequence_parallel/lasp2.
"""

from toolkit.runtime.algorithms import combine, concatenate
from toolkit.runtime.arrays import first_array, like
from toolkit.runtime.errors import ShapeError
from toolkit.runtime.kernel import Cost

from ._lasp2_kernels import add_through, chunk_states, inside, rounded, sum_of, total


def predict_time(size, tokens, heads, d, device, link, scheme="lasp2", *, collective="ring", dtype="float16"):
    """Seconds of the causal forward pass, one chunk a rank, identity features, on a full mesh.

    tokens       of one rank                       d           d_k = d_v, of one head
    device       hardware.Device                   link        hardware.Link of each pair of ranks
    scheme       "lasp2" or "lasp1"                collective  "ring", "tree" (recursive doubling) or "direct"
    raises       ShapeError  an unknown scheme or collective
    """
    x = like((heads, tokens, d), dtype)
    states = chunk_states(x, x)
    state, out = total(states), inside(x, x, x)
    before, behind = (_seconds(device, *call) for call in ((chunk_states, x, x), (inside, x, x, x, states)))
    after = _seconds(device, add_through, out, x, state) + _seconds(device, rounded, out, x, False)
    if scheme == "lasp1":
        hop, update = message_time(link, state.nbytes), _seconds(device, combine, state, state)
        first = before + behind + _seconds(device, sum_of, state[None], 0, 0) + after  # its past is zeros
        last = before + max(behind, hop) + (size - 2) * (update + hop) + after
        return max(first, last) if size > 1 else first
    rounds = {  # states in each message that waits for the one before
        "ring": [1] * (size - 1),
        "tree": [min(2**i, size - 2**i) for i in range((size - 1).bit_length())],
        "direct": [1] * (size > 1),
    }
    if scheme != "lasp2" or collective not in rounds:
        raise ShapeError(f"scheme {scheme!r} with collective {collective!r}: give lasp1 or lasp2, {', '.join(rounds)}")
    gathering = sum(message_time(link, n * state.nbytes) for n in rounds[collective])
    joining = _seconds(device, concatenate, (state[None],) * size)
    adding = _seconds(device, sum_of, like((size, *state.shape), state.dtype), 0, size - 1)
    return before + max(behind, gathering) + joining + adding + after


def message_time(link, nbytes):
    """Seconds of a message that has the link to itself."""
    return max(link.floor, link.latency + nbytes / min(link.bandwidth, link.flow_cap))


def _seconds(device, kernel, *args):
    """Of one call of a kernel."""
    cost = Cost(*kernel.cost(*args))
    return device.seconds(cost.flops, cost.bytes, cost.dtype or first_array(args).dtype, cost.kind)
