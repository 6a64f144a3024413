"""The selective scan: a diagonal linear recurrence whose step size, input and readout depend on the token.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          y_t = C_t · h_t

Each channel has `states` numbers of its own. Charged as if they stayed in fast memory.
Source: Gu and Dao, "Mamba", 2023, arXiv 2312.00752, algorithm 2. Chapter: attention/based.
"""

import numpy as np
from autograd.core import defvjp_argnums
from autograd.extend import primitive

from toolkit.runtime.arrays import like
from toolkit.runtime.errors import ShapeError
from toolkit.runtime.kernel import Cost, kernel


def _cost(x, delta, a, b, c, state=None):
    check(x, delta, a, b, c)
    states = x.shape[0] * a.nbytes * (1 if state is None else 2)
    return Cost(7 * x.size * a.shape[0], 3 * x.nbytes + a.nbytes + b.nbytes + c.nbytes + states)


def _out(x, delta, a, b, c, state=None):
    check(x, delta, a, b, c)
    return like(x), like((x.shape[0], *a.shape), x.dtype)


@kernel(cost=_cost, out=_out)
def selective_scan(x, delta, a, b, c, state=None):
    """Run the recurrence over all tokens.

    x, delta   (batch, tokens, channels), delta > 0      a   (states, channels), negative: how fast a state forgets
    b, c       (batch, tokens, states)
    state      (batch, states, channels), where to go on from; None: zeros
    returns    (y (batch, tokens, channels), state after the last token)
    costs      7 operations a token, channel and state
    raises     ShapeError
    """
    check(x, delta, a, b, c)
    state = np.zeros((x.shape[0], *a.shape), x.dtype) if state is None else state
    y = np.empty_like(x)
    for t, (decay, entering) in enumerate(_steps(x, delta, a, b)):
        state = decay * state + entering
        y[:, t] = (c[:, t, None, :] @ state)[:, 0]
    return y, state


def selective_scan_backward(x, delta, a, b, c, grad_y):
    """Gradients (dx, ddelta, da, db, dc) of sum(grad_y * selective_scan(x, delta, a, b, c)[0])."""
    check(x, delta, a, b, c)
    past, decays = [np.zeros((x.shape[0], *a.shape), x.dtype)], []
    for decay, entering in _steps(x, delta, a, b):
        decays.append(decay)
        past.append(decay * past[-1] + entering)
    dx, ddelta, da, db, dc = grads = tuple(np.zeros_like(array) for array in (x, delta, a, b, c))
    carry = np.zeros_like(past[0])  # gradient of h_t
    for t in range(x.shape[1])[::-1]:
        carry = carry + c[:, t, :, None] * grad_y[:, t, None, :]
        dc[:, t] = (past.pop() @ grad_y[:, t, :, None])[:, :, 0]
        db[:, t] = (carry @ (delta[:, t] * x[:, t])[:, :, None])[:, :, 0]
        along_b = (b[:, t, None, :] @ carry)[:, 0]
        carry = carry * decays[t]
        forgetting = carry * past[-1]  # gradient of Δ_t A
        da += np.sum(forgetting * delta[:, t, None, :], axis=0)
        ddelta[:, t] = np.sum(forgetting * a, axis=1) + along_b * x[:, t]
        dx[:, t] = along_b * delta[:, t]
    return grads


def _steps(x, delta, a, b):
    """What multiplies the state at each token, and what is added to it: two arrays (batch, states, channels)."""
    for t in range(x.shape[1]):
        yield np.exp(delta[:, t, None, :] * a), b[:, t, :, None] * (delta[:, t] * x[:, t])[:, None, :]


def check(x, delta, a, b, c):
    """Refuse shapes that do not fit together, and say what was given."""
    want = (*x.shape[:2], a.shape[0])
    if x.ndim != 3 or delta.shape != x.shape or a.shape[1] != x.shape[2] or b.shape != want or c.shape != want:
        raise ShapeError(
            f"selective_scan: x {x.shape}, delta {delta.shape}, a {a.shape}, b {b.shape}, c {c.shape}; needs x and "
            "delta (batch, tokens, channels), a (states, channels), b and c (batch, tokens, states)"
        )


scan_to_train = primitive(lambda x, delta, a, b, c: selective_scan(x, delta, a, b, c)[0])
scan_to_train.__doc__ = "y of `selective_scan` for autograd: its gradient is `selective_scan_backward`."


def _vjp(argnums, out, args, options):
    def vjp(grad_y):
        grads = selective_scan_backward(*args, grad_y)
        return tuple(grads[i] for i in argnums)

    return vjp


defvjp_argnums(scan_to_train, _vjp)
