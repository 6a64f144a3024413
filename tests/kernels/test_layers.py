"""Layers against PyTorch, forward and backward, in float64, float32 and float16; their costs; shape-only calls."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from toolkit.kernels import layers
from toolkit.runtime import Cluster, hardware, like, topology
from toolkit.runtime.arrays import is_shape_only
from toolkit.runtime.errors import DtypeError, ShapeError

torch = pytest.importorskip("torch")

BAR = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-2}  # absolute, for values of about unit size
DTYPE = pytest.mark.parametrize("dtype", BAR)
WHERE, TOKENS = np.array([3, 0, 17, 170, 9]), np.array([2, 0, 2, 6, 1])


def normal(*shapes, dtype="float64", seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def rotated(x):
    """Rotary embedding as complex numbers."""
    half = x.shape[-1] // 2
    turns = torch.polar(
        torch.ones(5, half, dtype=torch.float64),
        torch.as_tensor(WHERE[:, None] * 10_000.0 ** (-np.arange(half) / half)),
    )
    turned = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat((turned.real, turned.imag), dim=-1)


def normed(x, gain):
    return torch.nn.functional.rms_norm(x, gain.shape, gain, eps=1e-6)


def gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def entropy(logits):
    return torch.nn.functional.cross_entropy(logits, torch.as_tensor(TOKENS), reduction="none")


# name -> (shapes of the float arrays, ours, ours backward, PyTorch)
LAYERS = {
    "linear": ([(5, 7), (7, 4)], layers.linear, layers.linear_backward, torch.matmul),
    "linear of a batch": ([(2, 5, 7), (7, 4)], layers.linear, layers.linear_backward, torch.matmul),
    "rms_norm": ([(5, 8), (8,)], layers.rms_norm, layers.rms_norm_backward, normed),
    "gelu": ([(5, 8)], layers.gelu, lambda x, g: (layers.gelu_backward(x, g),), gelu),
    "rotary": ([(2, 5, 8)], lambda x: layers.rotary(x, WHERE),
               lambda x, g: (layers.rotary(g, WHERE, inverse=True),), rotated),
    "merge_heads": ([(2, 5, 4)], layers.merge_heads, lambda x, g: (layers.split_heads(g, 4),),
                    lambda x: x.transpose(0, 1).reshape(5, 8)),
    "embed": ([(9, 4)], lambda t: layers.embed(t, TOKENS), lambda t, g: (layers.embed_backward(t, TOKENS, g),),
              lambda t: t[torch.as_tensor(TOKENS)]),
    "softmax_cross_entropy": ([(5, 9)], lambda x: layers.softmax_cross_entropy(x, TOKENS),
                              lambda x, g: (layers.softmax_cross_entropy_backward(x, TOKENS, g),), entropy),
}  # fmt: skip
LAYER = pytest.mark.parametrize("name", LAYERS)


@DTYPE
@LAYER
def test_forward_equals_pytorch(name, dtype):
    shapes, ours, _, theirs = LAYERS[name]
    arrays = normal(*shapes, dtype=dtype)
    want = theirs(*(torch.as_tensor(a.astype("float64")) for a in arrays)).numpy()
    assert_allclose(ours(*arrays), want, rtol=0, atol=BAR[dtype])


@DTYPE
@LAYER
def test_backward_equals_pytorchs_autograd(name, dtype):
    shapes, ours, backward, theirs = LAYERS[name]
    arrays = normal(*shapes, dtype=dtype)
    (grad,) = normal(np.shape(ours(*arrays)), dtype=dtype, seed=1)
    leaves = [torch.tensor(a.astype("float64"), requires_grad=True) for a in arrays]
    theirs(*leaves).backward(torch.as_tensor(grad.astype("float64")))
    for got, leaf in zip(backward(*arrays, grad), leaves, strict=True):
        assert got.dtype == dtype
        assert_allclose(got, leaf.grad.numpy(), rtol=0, atol=BAR[dtype])


@DTYPE
@LAYER
def test_shape_only_calls_give_the_shapes_and_dtypes_of_real_ones(name, dtype):
    shapes, ours, backward, _ = LAYERS[name]
    arrays = normal(*shapes, dtype=dtype)
    out = np.asarray(ours(*arrays))
    real = [out, *backward(*arrays, out)]
    empty = [like(a) for a in arrays]
    shaped = [ours(*empty), *backward(*empty, ours(*empty))]
    assert all(map(is_shape_only, shaped))
    assert [(a.shape, a.dtype) for a in shaped] == [(a.shape, a.dtype) for a in real]


@DTYPE
@pytest.mark.parametrize(
    "shapes", [((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (6, 4, 5)), ((0, 4), (4, 5))]
)
def test_matmul_equals_numpy_in_float64(shapes, dtype):
    a, b = normal(*shapes, dtype=dtype)
    got = layers.matmul(a, b)
    assert got.dtype == dtype
    assert_allclose(got, a.astype("float64") @ b.astype("float64"), rtol=0, atol=BAR[dtype])


def test_add_and_cast_are_numpys():
    x, y = normal((3, 4), (3, 4))
    assert_array_equal(layers.add(x, y), x + y)
    assert_array_equal(layers.cast(x, "float16"), x.astype("float16"))


def test_cast_to_the_dtype_it_has_costs_nothing():
    (x,) = normal((3, 4))
    assert layers.cast(x, x.dtype) is x
    assert layers.cast.cost(x, x.dtype).bytes == 0


def test_large_scores_do_not_overflow_in_float16():
    logits = np.array([[60_000, -60_000, 0]], "float16")
    assert layers.softmax_cross_entropy(logits, np.array([0])).tolist() == [0.0]
    assert np.isfinite(layers.softmax_cross_entropy_backward(logits, np.array([1]), np.ones(1, "float32"))).all()


def test_split_heads_is_a_view_and_merge_heads_its_inverse():
    (x,) = normal((5, 12))
    heads = layers.split_heads(x, 4)
    assert np.shares_memory(heads, x)
    assert_array_equal(layers.merge_heads(heads), x)


# ---- costs -----------------------------------------------------------------------------------------------------------


def flops(program, *arrays):
    """Flops that the machine counts, and the names of the kernels it charged."""
    run = Cluster(topology.full_mesh(1, hardware.NVLINK4)).run(lambda comm, *given: program(*given) and None, *arrays)
    return sum(e.flops for e in run.trace), [e.name for e in run.trace]


@pytest.mark.parametrize(
    "program, shapes, want, names",
    [
        (layers.matmul, [(3, 4), (4, 5)], 2 * 3 * 4 * 5, ["matmul"]),
        (layers.matmul, [(7, 3, 4), (7, 4, 5)], 7 * 2 * 3 * 4 * 5, ["matmul"]),
        (layers.linear, [(2, 3, 4), (4, 5)], 2 * 2 * 3 * 4 * 5, ["linear"]),
        (layers.linear_backward, [(3, 4), (4, 5), (3, 5)], 4 * 3 * 4 * 5, ["linear_grad_x", "linear_grad_w"]),
        (layers.gelu, [(3, 4)], 0, ["gelu"]),
    ],
)
def test_products_are_charged_exactly_and_once(program, shapes, want, names):
    arrays = [like(shape) for shape in shapes]
    assert flops(lambda *given: [program(*given)], *arrays) == (want, names)


def test_a_product_reads_its_factors_and_writes_its_result():
    assert layers.linear.cost(like((3, 4), "float32"), like((4, 5), "float32")).bytes == 4 * (12 + 20 + 15)


# ---- finite differences, of a whole chain ----------------------------------------------------------------------------


def test_a_chain_of_layers_has_the_gradient_of_finite_differences():
    x, gain, w = normal((4, 6), (6,), (6, 9))
    targets = np.array([1, 0, 8, 3])

    def loss(x):
        hidden = layers.linear(layers.gelu(layers.rms_norm(x, gain)), w)
        return layers.softmax_cross_entropy(hidden, targets).mean()

    normed = layers.rms_norm(x, gain)
    logits = layers.linear(layers.gelu(normed), w)
    grad = layers.softmax_cross_entropy_backward(logits, targets, np.full(4, 1 / 4))
    grad = layers.gelu_backward(normed, layers.linear_grad_x(w, grad))
    got = layers.rms_norm_backward(x, gain, grad)[0]
    numeric, step = np.empty_like(x), 1e-6
    for place in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[place] = step
        numeric[place] = (loss(x + shift) - loss(x - shift)) / (2 * step)
    assert_allclose(got, numeric, rtol=0, atol=1e-8)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: layers.matmul(np.ones((3, 4)), np.ones((5, 6))), ShapeError, r"matmul: \(3, 4\) @ \(5, 6\)"),
        (lambda: layers.matmul(np.ones((3, 4)), np.ones((4, 6), "float32")), DtypeError, "float64 @ float32: cast"),
        (lambda: layers.linear(np.ones((3, 4)), np.ones((5, 6))), ShapeError, r"linear: .*x \(3, 4\), w \(5, 6\)"),
        (lambda: layers.linear_grad_w(np.ones((3, 4)), np.ones((2, 6))), ShapeError, "linear_grad_w"),
        (lambda: layers.rms_norm(np.ones((3, 4)), np.ones(3)), ShapeError, r"rms_norm: .*gain \(3,\)"),
        (lambda: layers.split_heads(np.ones((3, 10)), 4), ShapeError, "10 channels do not divide into heads of 4"),
        (lambda: layers.rotary(np.ones((1, 3, 4)), np.arange(2)), ShapeError, "give one a token"),
        (lambda: layers.rotary(np.ones((1, 3, 5)), np.arange(3)), ShapeError, "even head_dim"),
        (lambda: layers.softmax_cross_entropy(np.ones((3, 4)), np.arange(2)), ShapeError, r"targets \(2,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
