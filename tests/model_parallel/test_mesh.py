"""The grid of ranks: tensor parallelism fastest, every group a slice."""

import pytest

from toolkit.model_parallel._mesh import AXES, Grid
from toolkit.runtime import Cluster, hardware, topology
from toolkit.runtime.errors import ShapeError


def on(ranks, program, *args):
    return Cluster(topology.full_mesh(ranks, hardware.NVLINK3), hardware.IDEAL).run(program, *args).outputs


def members(comm, sizes, axes=(), order=AXES):
    grid = Grid(comm, **sizes, order=order)
    return grid.along(*axes).ranks if axes else tuple(getattr(grid, axis).ranks for axis in AXES)


def test_rank_is_tp_plus_t_times_dp_plus_d_times_pp():
    def number(comm):
        grid = Grid(comm, tp=2, dp=3, pp=2)
        return grid.tp.rank + 2 * (grid.dp.rank + 3 * grid.pp.rank)

    assert on(12, number) == list(range(12))


def test_groups_of_rank_5_of_a_2_by_2_by_2_grid():
    tp, cp, ep, dp, pp = on(8, members, {"tp": 2, "dp": 2, "pp": 2})[5]
    assert (tp, cp, ep, dp, pp) == ((4, 5), (5,), (5,), (5, 7), (1, 5))


def test_a_plane_is_the_product_of_its_axes():
    assert on(8, members, {"tp": 2, "cp": 2, "dp": 2}, ("cp", "dp"))[1] == (1, 3, 5, 7)


@pytest.mark.parametrize("axis", AXES)
def test_groups_along_an_axis_are_a_partition_of_all_ranks(axis):
    sizes = {"tp": 2, "cp": 2, "dp": 2, "pp": 2}
    found = on(16, members, sizes, (axis,))
    assert sorted(rank for group in set(found) for rank in group) == list(range(16))
    assert {len(group) for group in found} == {sizes.get(axis, 1)}


def test_another_order_puts_another_axis_on_neighbours():
    assert on(4, members, {"tp": 2, "pp": 2}, ("pp",), ("pp", "tp", "cp", "ep", "dp"))[0] == (0, 1)


def test_equal_groups_are_one_communicator_so_that_collectives_stay_in_step():
    def program(comm):
        grid = Grid(comm, dp=2)
        return grid.dp is grid.along("cp", "dp")

    assert on(2, program) == [True, True]


def test_at_is_the_rank_of_another_place():
    assert on(8, lambda comm: Grid(comm, tp=2, pp=4).at(pp=0)) == [0, 1] * 4


def test_sizes_that_do_not_multiply_to_the_ranks_are_refused():
    with pytest.raises(ShapeError, match="tp 2 × cp 1 × ep 1 × dp 2 × pp 1 is 4 ranks, and there are 8"):
        on(8, members, {"tp": 2, "dp": 2})


def test_an_order_without_an_axis_is_refused():
    with pytest.raises(ShapeError, match="name each of tp, cp, ep, dp, pp once"):
        on(2, members, {"tp": 2}, (), ("tp", "dp"))
