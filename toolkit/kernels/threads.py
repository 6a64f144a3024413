"""Share the work units of a compiled loop among threads.

The loop is a numba function with nogil=True that takes a range of units. Python threads fetch ranges: this needs no
numba thread pool, whose layers differ by machine, and no second compilation for parallel use. The number of threads
is numba's: all cores, or the environment variable NUMBA_NUM_THREADS.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock

SMALL = 2e7  # flops (0.2 ms): below, starting a thread costs more than it saves

_lock, _users, _limits = Lock(), 0, []


def threads_for(flops):
    """How many threads a job of that size deserves: one, or all."""
    from numba import config

    return 1 if flops < SMALL else config.NUMBA_NUM_THREADS


def share(threads, units, loop, *arguments):
    """Run loop(first, last, *arguments) over range(units) on this thread and threads - 1 helpers.

    Each thread fetches the next few units when it is done with the last, so a busy core takes fewer. BLAS products
    inside the loop stay on their thread. Results must not depend on who computes which unit.
    """
    threads = min(threads, units)
    step = max(1, units // (16 * threads) if threads > 1 else units)
    firsts = iter(range(0, units, step))

    def work():
        for first in firsts:
            loop(first, min(first + step, units), *arguments)

    with _one_blas_thread():
        helpers = [_helpers().submit(work) for _ in range(threads - 1)]
        try:
            work()
        finally:
            for helper in helpers:
                if not helper.cancel():  # one that has not begun has nothing left to do
                    helper.result()


@cache
def _helpers():
    """Threads that wait for work: starting one takes as long as a small block."""
    return ThreadPoolExecutor(os.cpu_count(), "kernel")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not survive a fork


@contextmanager
def _one_blas_thread():
    """BLAS does not spread over cores that are busy already; the former limits return when the last user leaves."""
    global _users
    libraries = _blas()
    with _lock:
        _users += 1
        if _users == 1:
            for library in libraries:
                _limits.append(library.num_threads)
                library.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for library in libraries:
                    library.set_num_threads(_limits.pop(0))


@cache
def _blas():
    import scipy.linalg.cython_blas  # noqa: F401  (the library that numba's products call: loaded, so that it is found)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas").lib_controllers
