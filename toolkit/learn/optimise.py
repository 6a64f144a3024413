"""Adam: steps of even size along the gradient, for models small enough to train while a reader waits.

Source: Kingma and Ba 2015, arXiv 1412.6980; weight decay as in Loshchilov and Hutter 2019, arXiv 1711.05101.
Chapter: all that train.
"""

import numpy as np
from autograd import value_and_grad


def adam(loss, params, batch, *, steps, rate=3e-3, schedule="cosine", seed=0, clip=1.0, decay=0.0, betas=(0.9, 0.98)):
    """Minimise `loss(params, *batch(random))` over `steps` batches.

    loss      written with autograd.numpy; returns a scalar
    params    numpy array, or nested dict, list or tuple of them, all of one float dtype; left as it is
    batch     called with a numpy Generator once per step; returns the tuple of the loss's other arguments
    rate      learning rate, after a rise over the first tenth of the steps
    schedule  "cosine": down to 0 at the end; "constant"
    clip      largest norm of a gradient, over all arrays together
    decay     share of each parameter, times the rate, that a step takes away
    returns   (params, losses): like `params`; float64 array (steps,), the loss before each step
    raises    ValueError          another schedule
              FloatingPointError  the loss is not a finite number; says at which step
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"adam: schedule is {schedule!r}; give 'cosine' or 'constant'")
    random, gradient = np.random.default_rng(seed), value_and_grad(loss)
    x = flat(params)
    mean, square, losses = np.zeros_like(x), np.zeros_like(x), np.empty(steps)
    for step in range(steps):
        losses[step], g = gradient(shaped(x, params), *batch(random))
        if not np.isfinite(losses[step]):
            raise FloatingPointError(f"adam: the loss is {losses[step]} at step {step}; try a rate below {rate:g}")
        g = flat(g)
        g *= min(1.0, clip / (np.linalg.norm(g) + 1e-12))
        mean += (1 - betas[0]) * (g - mean)
        square += (1 - betas[1]) * (g * g - square)
        unbiased = mean / (1 - betas[0] ** (step + 1)), square / (1 - betas[1] ** (step + 1))
        now = rate * rate_at(step, steps, schedule)
        x = x - (now * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + decay * x)).astype(x.dtype, copy=False)
    return shaped(x, params), losses


def flat(params):
    """All numbers of nested arrays in one new vector, of their common dtype."""
    return np.concatenate([array.ravel() for array in _arrays(params)])


def shaped(vector, params):
    """The numbers of `vector` in the nesting and shapes of `params`; arrays are views of `vector`."""
    sizes = [array.size for array in _arrays(params)]
    return _rebuilt(params, iter(np.split(vector, np.cumsum(sizes)[:-1])))


def _arrays(params):
    if isinstance(params, np.ndarray):
        yield params
    else:
        for part in params.values() if isinstance(params, dict) else params:
            yield from _arrays(part)


def _rebuilt(params, parts):
    if isinstance(params, np.ndarray):
        return next(parts).reshape(params.shape)
    if isinstance(params, dict):
        return {name: _rebuilt(part, parts) for name, part in params.items()}
    return type(params)(_rebuilt(part, parts) for part in params)


def rate_at(step, steps, schedule="cosine"):
    """Share of the learning rate at a step: a linear rise over the first tenth, then the schedule."""
    rise = min(1.0, (step + 1) / max(1, steps // 10))
    return rise * (0.5 + 0.5 * np.cos(np.pi * step / steps) if schedule == "cosine" else 1.0)
