"""The compiled work units of `flash_fft_conv.py`: load, transform, multiply, transform back, store, all in two buffers.

The loops release the interpreter lock and take a range of units, for `threads.share`. A tile's two buffers are all the
memory that they take. Chapter: attention/flash_fft_conv.
"""

import numpy as np
from numba import njit

from toolkit.attention._flash_fft_conv_stages import FAST_MATH, from_bins, inline, layout, room, to_bins

PLAIN, PACKED, PAIRED = 0, 1, 2  # how real sequences become complex ones, see `Plan`

loop = njit(cache=True, nogil=True, fastmath=FAST_MATH)


# ---- between a batch of real sequences and a tile --------------------------------------------------------------------


@inline
def _row(array, b, h):
    """Row (b, h), or nothing where the last pair of a batch has no second row, or where there is no gate."""
    return array[b, h] if b < array.shape[0] else array[0, 0, :0]


@inline
def _fill(x, row, gate, first, step):
    """x[j] = row[first + j · step], times the gate where there is one; 0 beyond the end."""
    count = max(0, min(len(x), (len(row) - first + step - 1) // step))
    for j in range(count):
        x[j] = row[first + j * step]
    if len(gate) > 0:
        for j in range(count):
            x[j] *= gate[first + j * step]
    x[count:] = 0


@inline
def load(t, kind, u, gate, h, b, tile, x):
    """Complex sequences b … b + tile - 1 of channel h, gated, into the layout of stage 0."""
    runs, length, to_im, by_run, by_prefix = layout(t, 0, tile)
    for q in range(tile):
        one = b + q if kind != PAIRED else 2 * (b + q)
        other = one if kind != PAIRED else one + 1
        step = 2 if kind == PACKED else 1
        u_re, u_im, gate_re, gate_im = _row(u, one, h), _row(u, other, h), _row(gate, one, h), _row(gate, other, h)
        for run in range(runs):
            at, first = q * by_prefix + run * by_run, run * length * step
            _fill(x[at : at + length], u_re, gate_re, first, step)
            im = x[to_im + at : to_im + at + length]
            if kind == PLAIN:
                im[:] = 0
            else:
                _fill(im, u_im, gate_im, first + (kind == PACKED), step)


@inline
def _drain(x, row, gate, first, step):
    """row[first + j · step] = x[j], times the gate where there is one."""
    count = max(0, min(len(x), (len(row) - first + step - 1) // step))
    if len(gate) > 0:
        for j in range(count):
            row[first + j * step] = x[j] * gate[first + j * step]
    else:
        for j in range(count):
            row[first + j * step] = x[j]


@inline
def store(t, kind, x, gate, h, b, tile, y):
    """The way back from `load`."""
    runs, length, to_im, by_run, by_prefix = layout(t, 0, tile)
    for q in range(tile):
        one = b + q if kind != PAIRED else 2 * (b + q)
        other = one if kind != PAIRED else one + 1
        step = 2 if kind == PACKED else 1
        y_re, y_im, gate_re, gate_im = _row(y, one, h), _row(y, other, h), _row(gate, one, h), _row(gate, other, h)
        for run in range(runs):
            at, first = q * by_prefix + run * by_run, run * length * step
            _drain(x[at : at + length], y_re, gate_re, first, step)
            if kind != PLAIN:
                _drain(x[to_im + at : to_im + at + length], y_im, gate_im, first + (kind == PACKED), step)


# ---- products of spectra ---------------------------------------------------------------------------------------------


@inline
def _weigh(z, s, conjugate):
    """z *= s, bin by bin, or the conjugate of s: both (rows, 2, last) with the same number of rows."""
    sign = -1 if conjugate else 1
    for j in range(len(s)):
        z_re, z_im, s_re, s_im = z[j, 0], z[j, 1], s[j, 0], s[j, 1]
        for m in range(len(z_re)):
            a, b = s_re[m], sign * s_im[m]
            z_re[m], z_im[m] = z_re[m] * a - z_im[m] * b, z_re[m] * b + z_im[m] * a


@inline
def _weigh_packed(t, z, s, d, conjugate, into):
    """into = s z + d conj(z[-k]) on flat (rows, 2, last); with `conjugate`, conj(s) z - conj(d) conj(z[-k]).

    z holds even samples in its real and odd ones in its imaginary part; this multiplies the spectrum of the whole.
    """
    last = t.stages[-1, 1]
    bins = len(t.mirror)
    sign = -1 if conjugate else 1
    for first in range(0, bins, last):
        for m in range(last):
            at, mirror = 2 * first + m, t.mirror[first + m]
            z_re, z_im, c_re, c_im = z[at], z[at + last], z[mirror], -z[mirror + last]
            s_re, s_im, d_re, d_im = s[at], sign * s[at + last], sign * d[at], d[at + last]
            into[at] = z_re * s_re - z_im * s_im + c_re * d_re - c_im * d_im
            into[at + last] = z_re * s_im + z_im * s_re + c_re * d_im + c_im * d_re


@inline
def unpack(t, z, s, d):
    """From the packed spectrum z of a sequence to the (s, d) with which it filters others (see `_weigh_packed`).

    With E, O the spectra of even and odd samples, z = E + iO:  s = E + iO (1 - w²) / 2,  d = iO (1 + w²) / 2.
    """
    last = t.stages[-1, 1]
    for first in range(0, len(t.mirror), last):
        for m in range(last):
            at, mirror = 2 * first + m, t.mirror[first + m]
            w_re, w_im = t.turn[0, first + m], t.turn[1, first + m]
            z_re, z_im, c_re, c_im = z[at], z[at + last], z[mirror], -z[mirror + last]
            e_re, e_im, o_re, o_im = (z_re + c_re) / 2, (z_im + c_im) / 2, (z_re - c_re) / 4, (z_im - c_im) / 4
            p_re, p_im = o_re * w_re - o_im * w_im, o_re * w_im + o_im * w_re
            s[at], s[at + last] = e_re + o_re - p_re, e_im + o_im - p_im
            d[at], d[at + last] = o_re + p_re, o_im + p_im


@inline
def _filter(t, kind, tile, y, x, s, d, conjugate):
    """Multiply the bins of every sequence in y by a filter (s, d); x is free to use. Returns where the result is."""
    size = s.size
    for q in range(tile):
        z = y[q * size : (q + 1) * size]
        if kind == PACKED:
            _weigh_packed(t, z, s.reshape(-1), d.reshape(-1), conjugate, x[q * size : (q + 1) * size])
        else:
            _weigh(z.reshape(s.shape), s, conjugate)
    return (x, y) if kind == PACKED else (y, x)


# ---- the work units --------------------------------------------------------------------------------------------------


@loop
def transform(first, last, t, kind, tile, rows, s, d):
    """Bins (rows, bins before, 2, last) of rows (rows, 1, taps), some tiles of them; PACKED: s, d of `unpack`."""
    floats = room(t, tile)
    x, y = np.empty(floats, s.dtype), np.empty(floats, s.dtype)
    h, size = np.int64(0), s[0].size
    for b in range(first * tile, min(last * tile, len(rows)), tile):
        count = min(tile, len(rows) - b)
        load(t, kind, rows, rows[:0], h, b, count, x)
        to_bins(t, count, x, y)
        for q in range(count):
            z = y[q * size : (q + 1) * size]
            if kind == PACKED:
                unpack(t, z, s[b + q].reshape(-1), d[b + q].reshape(-1))
            else:
                s[b + q] = z.reshape(s[0].shape)


@loop
def convolve(first, last, t, kind, units, u, s, d, pre, post, out):
    """The whole convolution of some units; a unit (h, b, tile) is `tile` sequences of channel h from b on."""
    floats = room(t, units[:, 2].max())
    x, y = np.empty(floats, out.dtype), np.empty(floats, out.dtype)
    for unit in range(first, last):
        h, b, tile = units[unit]
        load(t, kind, u, pre, h, b, tile, x)
        to_bins(t, tile, x, y)
        bins, free = _filter(t, kind, tile, y, x, s[h], d[h], False)
        from_bins(t, tile, bins, free)
        store(t, kind, free, post, h, b, tile, out)


@inline
def _correlate(t, kind, u_bins, g_bins, total, s, d, into):
    """total += conj(u) g, bin by bin, for one sequence; s, d, into are free to use when PACKED."""
    if kind == PACKED:
        unpack(t, u_bins, s, d)
        _weigh_packed(t, g_bins, s, d, True, into)
        for j in range(len(total)):
            total[j] += into[j]
        return
    last = t.stages[-1, 1]
    for at in range(0, len(total), 2 * last):
        for j in range(at, at + last):
            a, b, c, e = u_bins[j], u_bins[j + last], g_bins[j], g_bins[j + last]
            total[j] += a * c + b * e
            total[j + last] += a * e - b * c


@loop
def differentiate(first, last, t, tk, kind, sequences, u, s, d, weights, pre, post, g, du, dk, dpre, dpost):
    """Gradients of channels first … last - 1. A channel is one unit, because dk sums over its batch.

    Nothing was kept by the forward pass: the spectra of u are computed again.
    """
    floats = max(room(t, 1), room(tk, 1))
    size = s[0].size
    x, y, u_bins, g_bins, total = (np.empty(floats, du.dtype), np.empty(floats, du.dtype), np.empty(size, du.dtype),
                                   np.empty(size, du.dtype), np.empty(size, du.dtype))  # fmt: skip
    us, ud = np.empty(size, du.dtype), np.empty(size, du.dtype)
    none, zero, one = pre[:0], np.int64(0), np.int64(1)
    for h in range(first, last):
        total[:] = 0
        for b in range(sequences):
            load(t, kind, u, pre, h, b, one, x)
            to_bins(t, one, x, y)
            u_bins[:] = y[:size]
            load(t, kind, g, post, h, b, one, x)
            to_bins(t, one, x, y)
            g_bins[:] = y[:size]
            _correlate(t, kind, u_bins, g_bins, total, us, ud, x)
            bins, free = _filter(t, kind, one, y, x, s[h], d[h], True)
            from_bins(t, one, bins, free)
            store(t, kind, free, pre, h, b, one, du)
            if dpre.size > 0:
                store(t, kind, free, u, h, b, one, dpre)
            if dpost.size > 0:
                y[:size] = u_bins
                bins, free = _filter(t, kind, one, y, x, s[h], d[h], False)
                from_bins(t, one, bins, free)
                store(t, kind, free, g, h, b, one, dpost)
        y[:size] = total * weights
        from_bins(tk, one, y, x)
        store(tk, kind, x, none, h, zero, one, dk)


@loop
def direct(first, last, u, k, out):
    """The definition, for rows first … last - 1 of u (rows, L), k (rows, taps): O(L · taps)."""
    taps = k.shape[1]
    for r in range(first, last):
        out[r] = 0
        for lag in range(min(taps, u.shape[1])):
            weight = k[r, lag]
            for i in range(lag, u.shape[1]):
                out[r, i] += weight * u[r, i - lag]
