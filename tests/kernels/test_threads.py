"""Work shared among threads: every unit is done once, errors surface, and a fork can go on."""

import os
from threading import current_thread, main_thread

import numpy as np
import pytest

from toolkit.kernels.threads import share


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("units", [0, 1, 7, 100])
def test_every_unit_is_done_once(threads, units):
    done = np.zeros(units, int)

    def loop(first, last):
        done[first:last] += 1

    share(threads, units, loop)
    assert (done == 1).all()


def test_what_a_helper_raises_reaches_the_caller():
    def loop(first, last):
        while current_thread() is main_thread() and not helped:  # leave units over until the helper has begun
            pass
        if current_thread() is not main_thread():
            helped.append(first)
            raise ArithmeticError("in a helper")

    helped = []
    with pytest.raises(ArithmeticError, match="in a helper"):
        share(2, 8, loop)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of forks beside threads
def test_a_forked_process_has_helpers_of_its_own():
    share(2, 8, lambda first, last: None)  # the parent's helpers exist
    child = os.fork()
    if child == 0:
        helped = []

        def loop(first, last):
            while current_thread() is main_thread() and not helped:
                pass
            helped.append(first)

        share(2, 8, loop)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
