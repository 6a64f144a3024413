"""The kernels of the book on torch tensors: what a real GPU runs when a program calls them.

Each has the name, the arguments and the results of the kernel it stands for. Others run as they are: a kernel that only
uses operators works on tensors too. Source of the attention kernel: Dao 2023, arXiv 2307.08691, as it ships in PyTorch.
"""

import torch

from toolkit.kernels import attention as book
from toolkit.kernels import elementwise, layers
from toolkit.runtime import algorithms
from toolkit.runtime.errors import DtypeError

OPERATORS = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum, "prod": torch.multiply}


def attention(q, k, v, causal=False, return_lse=False):
    """FlashAttention-2 on CUDA (float16, bfloat16); PyTorch's flash kernel of the CPU elsewhere. lse is float32."""
    if q.is_cuda:
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise DtypeError(f"the flash kernel of a GPU takes float16, not {q.dtype}: convert q, k and v first")
        batch = [a[None].transpose(1, 2) for a in (q, k, v)]  # (1, tokens, heads, head_dim): strides, no copy
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *batch, None, None, q.shape[1], k.shape[1], 0.0, causal, False
        )
        out = out[0].transpose(0, 1)
    else:
        group = q.shape[0] // k.shape[0]
        batch = [q[None], *(a.repeat_interleave(group, 0)[None] for a in (k, v))]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*batch, 0.0, causal)
        out = out[0]
    return (out, lse[0]) if return_lse else out


def attention_backward(q, k, v, out, lse, grad_out, causal=False, delta=None):
    """The gradient that belongs to `attention`; float32, whatever travels in."""
    if out is None:
        out = along(grad_out, delta)
    if q.is_cuda:
        batch = [a[None].transpose(1, 2) for a in (grad_out, q, k, v, out)]
        nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout's random state
        found = torch.ops.aten._flash_attention_backward(
            *batch, lse[None].contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, nothing, nothing
        )
        return tuple(grad[0].transpose(0, 1).float() for grad in found)
    group = q.shape[0] // k.shape[0]
    wide = [a.repeat_interleave(group, 0)[None] for a in (k, v)]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out[None], q[None], *wide, out[None], lse[None].contiguous(), 0.0, causal
    )
    return dq[0].float(), *(grad[0].float().unflatten(0, (-1, group)).sum(1) for grad in (dk, dv))


def along(grad_out, delta):
    """Some `out` with sum(grad_out * out) = delta, which is all that a gradient needs of it: the one along grad_out.

    It is no longer than the true one, so it fits the same dtype.
    """
    if grad_out.is_cuda:
        return _fused().along(grad_out, delta)
    grad = grad_out.float()
    length = grad.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (grad * (delta[..., None] / length)).to(grad_out.dtype)


def empty_accumulator(q):
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    return out, torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)


def merge(acc, part):
    """In place; the reads and writes of its cost when Triton fuses it, more when it runs op by op."""
    out, lse = acc
    (_fused().merge if out.is_cuda else _merge)(out, lse, *part)
    return acc


def _merge(out, lse, part_out, part_lse):
    total = torch.logaddexp(lse, part_lse)
    total = torch.where(total == -torch.inf, torch.zeros_like(total), total)  # rows that no key has reached
    out.mul_(torch.exp(lse - total)[..., None]).add_(part_out * torch.exp(part_lse - total)[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def _fused():
    """Triton's kernels; a machine without a GPU need not have Triton."""
    from toolkit.kernels import _gpu_rows

    return _gpu_rows


def finish(acc, like):
    out, lse = acc
    return out.to(like.dtype), lse


def delta(grad_out, out):
    if out.is_cuda:
        return _fused().delta(grad_out, out)
    return (grad_out.float() * out.float()).sum(-1)


def accumulate(total, part):
    return total.add_(part)


def combine(x, y, op="sum"):
    return OPERATORS[op](x, y)


def concatenate(parts, axis=0):
    return torch.cat(parts, axis)


def cast(x, dtype):
    return x.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype)))


KERNELS = {  # the book's kernel -> what stands for it
    getattr(module, f.__name__): f
    for module, functions in (
        (book, (attention, attention_backward, empty_accumulator, merge, finish, delta)),
        (elementwise, (accumulate,)),
        (layers, (cast,)),
        (algorithms, (combine, concatenate)),
    )
    for f in functions
}
