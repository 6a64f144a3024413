"""Recommend: names mean what was published, the ranking is that of the runs, reasons name what is narrow."""

import argparse
import math

import pytest

from toolkit import catalogue, recommend
from toolkit.catalogue import Model
from toolkit.runtime import Cluster, hardware, like, per_rank, topology
from toolkit.runtime.hardware import Link
from toolkit.sequence_parallel import _block as blocks
from toolkit.sequence_parallel import ulysses
from toolkit.sequence_parallel._compare import kept_bytes, nodes_of
from toolkit.sequence_parallel._methods import layer, methods

TINY = Model("tiny", layers=2, h=64, heads=8, kv_heads=4, mlp=128, vocabulary=100)
FAST = Link(1e12, name="fast")
SLOW = hardware.Device("slow", flops=1e9, memory_bandwidth=math.inf)  # computes products, and nothing else takes time


def switch(ranks=4, link=FAST, device=SLOW):
    return Cluster(topology.switch(ranks, link), device)


def result_of(name, cluster, model=TINY, tokens=256, **options):
    (result,), _ = recommend.compare(model, tokens, cluster, only=[name], **options)
    return result


def refused(model, tokens, cluster, **options):
    return {one.method: one.why for one in recommend.compare(model, tokens, cluster, **options)[1]}


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, billions",
    [("llama-7b", 6.7), ("llama-13b", 13.0), ("llama-33b", 32.5), ("llama-65b", 65.2), ("llama-70b", 69.0),
     ("llama3-8b", 8.03), ("llama3-70b", 70.6), ("llama3-405b", 405.9), ("mistral-7b", 7.24), ("gpt-6.7b", 6.7),
     ("gpt-175b", 174.6)],
)  # fmt: skip
def test_a_model_has_as_many_weights_as_published(name, billions):
    assert catalogue.model(name).parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", catalogue.MODELS)
def test_the_block_of_a_model_has_the_weights_that_are_counted(name):
    model = catalogue.model(name)
    per_layer = sum(math.prod(shape) for shape in blocks.shapes(*model.block).values())
    outside = (1 if model.tied else 2) * model.vocabulary * model.h + model.h
    assert model.layers * per_layer + outside == model.parameters


def test_a_gated_mlp_keeps_its_weights_in_two_matrices():
    assert catalogue.model("llama-7b").hidden * 2 == 3 * 11_008


def test_an_unknown_model_is_answered_with_the_closest_name():
    with pytest.raises(ValueError, match=r"no model 'lama-7b' \(did you mean llama-7b\?\); choose from llama-7b"):
        catalogue.model("lama-7b")


# ---- clusters and tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, ranks, nodes, device",
    [("h100x64", 64, 8, "H100"), ("A100x16", 16, 2, "A100"), ("h200x8", 8, 1, "H200"), ("h100x3", 3, 1, "H100"),
     ("a10x4", 4, 2, "A10"), ("a10x16", 16, 2, "A10"), ("a10x3", 3, 3, "A10"), ("mi250x8", 8, 1, "MI250X"),
     ("mi250xx16", 16, 2, "MI250X")],
)  # fmt: skip
def test_a_cluster_is_read_from_its_name(text, ranks, nodes, device):
    cluster = catalogue.cluster(text)
    assert (cluster.size, nodes_of(cluster), cluster.device.name) == (ranks, nodes, device)


@pytest.mark.parametrize(
    "text, inside, across",
    [("h100x16", {"NVLink 4"}, {"InfiniBand NDR"}), ("a100x16", {"NVLink 3"}, {"InfiniBand HDR"}),
     ("a10x4", {"PCIe 4 x16"}, {"PCIe 4 x16"}), ("mi250x16", {"Infinity Fabric × 4"}, None)],
)  # fmt: skip
def test_neighbours_and_nodes_are_joined_by_the_links_of_the_machine(text, inside, across):
    machine = catalogue.cluster(text).topology
    assert {machine.link(*edge).name for edge in machine.route(0, 1)} == inside
    far = {machine.link(*edge).name for edge in machine.route(1, machine.ranks[-1])}
    assert far == across if across else "Slingshot 11" in far


def test_a_node_of_a10s_has_one_slow_way_out():
    machine = catalogue.cluster("a10x16").topology
    rates = [machine.link(*edge).bandwidth for edge in machine.route(0, 15)]
    assert min(rates) == 12.5e9 and machine.medium("gate0", "wan") in machine.route(0, 15)


@pytest.mark.parametrize(
    "text, words",
    [("b200x8", "no device 'b200'.*did you mean h200"), ("h100x12", "multiple of 8, not 12"), ("h100", "as in h100x64"),
     ("h100x0", "at least one"), ("mi250x4", "multiple of 8, not 4"), ("x8", "as in h100x64")],
)  # fmt: skip
def test_a_cluster_that_does_not_exist_is_refused(text, words):
    with pytest.raises(ValueError, match=f"cluster '{text}': .*{words}"):
        catalogue.cluster(text)


@pytest.mark.parametrize(
    "text, tokens",
    [("4096", 4096), ("128k", 131_072), ("1M", 1_048_576), ("1.5K", 1536), ("1_000", 1000), ("2,048", 2048)],
)
def test_tokens_are_read_with_binary_units(text, tokens):
    assert catalogue.tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "1.3", "many", "", "1G", "0.3k"])
def test_tokens_that_are_no_whole_number_are_refused(text):
    with pytest.raises(ValueError, match="whole number above 0"):
        catalogue.tokens(text)


# ---- who may run -----------------------------------------------------------------------------------------------------


def legal(name, heads, kv_heads, hidden, tokens, ranks, nodes):
    """Whether a method can run, by arithmetic."""
    per_node = ranks // nodes
    whole = tokens % ranks == 0
    return {
        "ring, zigzag": tokens % (2 * ranks) == 0,
        "ring, both ways": tokens % (4 * ranks) == 0,
        "all-gather": tokens % (2 * ranks) == 0,
        "TokenRing": tokens % (2 * ranks) == 0,
        "TokenRing × ring": tokens % (2 * ranks) == 0,
        "ring, striped": whole,
        "ring, contiguous": True,
        "LightSeq": whole,
        "Ulysses": whole and heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0),
        "Ulysses × ring": whole
        and tokens % (2 * nodes) == 0
        and heads % per_node == 0
        and (kv_heads % per_node == 0 or per_node % kv_heads == 0),
        "LASP-2": heads == kv_heads,
        "Megatron": whole and heads % ranks == kv_heads % ranks == hidden % ranks == 0,
    }[name]


@pytest.mark.parametrize("ranks, nodes", [(2, 1), (3, 1), (4, 2), (6, 2), (8, 1), (8, 2)])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 4), (12, 3), (8, 1)])
@pytest.mark.parametrize("tokens", [192, 200, 198, 195])
def test_exactly_the_legal_methods_run(tokens, heads, kv_heads, ranks, nodes):
    model = Model("m", 1, 8 * heads, heads, kv_heads, mlp=32, vocabulary=10)
    machine = topology.two_level(nodes, ranks // nodes, FAST, FAST, inside="switch")
    results, refusals = recommend.compare(model, tokens, Cluster(machine, hardware.IDEAL), training=False)
    names = {method.name for method in methods(nodes)}
    expected = {name for name in names if legal(name, heads, kv_heads, model.hidden, tokens, ranks, nodes)}
    assert {one.method for one in results} == expected
    assert {one.method for one in refusals} == names - expected


@pytest.mark.parametrize(
    "method, words",
    [("Ulysses", "8 query heads do not divide among 16 ranks"), ("Megatron", "8 query heads do not divide among 16"),
     ("ring, zigzag", "pad to 224"), ("LightSeq", "pad the sequence to a multiple of 16")],
)  # fmt: skip
def test_a_refusal_says_what_does_not_divide(method, words):
    assert words in refused(TINY, 200, switch(16))[method]


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_what_stays_is_the_state_and_the_inputs_of_layers():
    assert kept_bytes(TINY, 100, ranks=4) == 16 * TINY.parameters / 4 + 2 * 100 * 64 * 2


def test_a_forward_pass_keeps_weights_and_a_cache_of_keys_and_values():
    assert kept_bytes(TINY, 100, 4, training=False) == 2 * TINY.parameters / 4 + 2 * 100 * 2 * 4 * 8 * 2


@pytest.mark.parametrize("method", [method.name for method in methods(1) if method.softmax])
def test_a_method_fits_into_what_it_says_it_needs_and_into_no_byte_less(method):
    need = result_of(method, switch()).memory
    enough, short = (
        recommend.compare(TINY, 256, switch(device=hardware.replace(SLOW, memory_capacity=capacity)), only=[method])
        for capacity in (need, need - 1)
    )
    assert not enough[1] and not short[0]
    assert short[1][0].why.startswith("does not fit: rank")


def test_a_model_whose_state_alone_is_too_large_is_refused():
    cluster = switch(device=hardware.replace(SLOW, memory_capacity=1000))
    assert all("state of the model" in why for why in refused(TINY, 256, cluster).values())


def test_all_gather_needs_more_memory_than_the_ring():
    assert result_of("all-gather", switch(8)).memory > 1.2 * result_of("ring, zigzag", switch(8)).memory


# ---- the ranking -----------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_makespans_of_the_layer_run_by_itself():
    cluster = Cluster(topology.two_level(2, 4, FAST, Link(1e8), inside="switch"), SLOW)
    shapes = blocks.shapes(*TINY.block)
    count = sum(math.prod(shape) for shape in shapes.values())
    spans = {}
    for method in methods(2):
        if method.softmax and not method.in_shards:
            run = cluster.run(
                layer, method, like(count, "float16"), shapes, like(-(-count // 8), "float16"),
                per_rank([like((32, 64), "float16")] * 8), per_rank([like(32, "int64")] * 8), 8,
            )  # fmt: skip
            spans[method.name] = run.makespan
    results, refusals = recommend.compare(TINY, 256, cluster, only=spans)
    assert [(one.method, one.seconds) for one in results] == sorted(spans.items(), key=lambda item: item[1])
    assert not refusals


@pytest.mark.parametrize("method", [method.name for method in methods(2) if method.softmax])
def test_work_imbalance_and_waiting_make_the_whole_time(method):
    cluster = Cluster(topology.two_level(2, 2, FAST, Link(1e8, 1e-5), inside="switch"), SLOW)
    one = result_of(method, cluster)
    assert one.work + one.imbalance + one.waiting == pytest.approx(one.seconds, rel=1e-9)
    assert min(one.work, one.imbalance, one.waiting) >= 0


def weights_sent(model, ranks, training):
    """Bytes that gathering and scattering one layer's weights takes: twice gathered and once scattered."""
    count = sum(math.prod(shape) for shape in blocks.shapes(*model.block).values())
    return (3 if training else 1) * (ranks - 1) * -(-count // ranks) * 2


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("method, scheme", [("Ulysses", "ulysses"), ("ring, zigzag", "ring"), ("Megatron", "megatron")])
def test_bytes_sent_are_the_formulas(method, scheme, training):
    model = Model("m", 1, 64, 8, 8, mlp=128, vocabulary=10)
    passes = ulysses.predict_bytes(256, 8, 8, 8, 2, 4, scheme)
    want = 2 * passes["forward"] + passes["backward"] if training else passes["forward"]
    want += 0 if method == "Megatron" else weights_sent(model, 4, training)
    assert result_of(method, switch(), model, training=training).sent == want


def test_one_device_sends_nothing():
    model = Model("m", 1, 64, 8, 8, mlp=128, vocabulary=10)
    results, refusals = recommend.compare(model, 256, switch(1))
    assert {one.sent for one in results} == {0} and not refusals
    assert "sends nothing" in recommend.reason(results[0])


# ---- reasons ---------------------------------------------------------------------------------------------------------


def test_a_contiguous_causal_ring_is_called_unbalanced():
    assert recommend.reason(result_of("ring, contiguous", switch())).startswith("unbalanced: rank 3 computes")


def test_a_ring_on_slow_links_is_bound_by_one_link():
    words = recommend.reason(result_of("ring, zigzag", switch(link=Link(1e6, name="thin")), tokens=64))
    assert words.startswith("bound by one link: thin")


def test_the_link_that_is_named_is_the_narrow_one():
    cluster = Cluster(topology.two_level(2, 2, FAST, Link(1e5, name="thin"), inside="switch"), SLOW)
    one = result_of("ring, zigzag", cluster, tokens=64)
    assert one.busiest.name in {"thin out of rank 1", "thin into rank 2", "thin out of rank 3", "thin into rank 0"}


def test_the_narrow_links_seconds_are_its_bytes_over_its_bandwidth():
    one = result_of("Ulysses", switch(link=Link(1e6)))
    assert one.busiest.seconds == one.busiest.bytes / 1e6 and one.busiest.bytes == one.sent


def test_an_all_to_all_that_nothing_hides_is_said_to_wait():
    words = recommend.reason(result_of("Ulysses", switch(link=Link(2e7, name="thin")), training=False))
    assert words.startswith("waits") and "thin" in words and "at its speed" in words


def test_messages_that_cost_latency_only_are_said_to_depend_on_each_other():
    words = recommend.reason(result_of("Megatron", switch(link=Link(1e12, 0.1))))
    assert "that depend on each other" in words


def test_a_method_that_hides_its_messages_computes():
    assert recommend.reason(result_of("ring, zigzag", switch())).startswith("computes 100% of the time")


def test_partial_results_that_must_be_merged_are_named_as_work():
    slow_memory = hardware.Device("slow memory", flops=math.inf, memory_bandwidth=1e6)
    results, _ = recommend.compare(TINY, 256, switch(device=slow_memory))
    frugal = min(results, key=lambda one: one.work)
    ring = next(one for one in results if one.method == "ring, zigzag")
    assert f"more than {frugal.method}: smaller kernels, copies and merges" in recommend.reason(ring, frugal)


def test_half_duplex_links_are_counted_as_the_one_medium_that_they_are():
    links = Link(1e6, duplex=False), Link(1e6)
    shared, duplex = (result_of("ring, zigzag", switch(link=link), tokens=64) for link in links)
    assert shared.busiest.bytes == 2 * duplex.busiest.bytes


# ---- the command line ------------------------------------------------------------------------------------------------


def command(arguments):
    parser = argparse.ArgumentParser()
    recommend.add_command(parser.add_subparsers(required=True))
    options = parser.parse_args(["recommend", *arguments.split()])
    options.go(options)


def test_the_command_prints_the_ranking_with_a_reason_for_each_row(capsys):
    command("--model llama-7b --tokens 8k --cluster a100x4")
    out = capsys.readouterr().out
    results, _ = recommend.compare(catalogue.model("llama-7b"), 8192, catalogue.cluster("a100x4"))
    results = [one for one in results if one.softmax]
    frugal = min(results, key=lambda one: one.work)
    places = [out.index(f"{i}  {one.method}: {recommend.reason(one, frugal)}.") for i, one in enumerate(results, 1)]
    assert places == sorted(places)
    assert f"Best: {results[0].method}," in out and "Refused" not in out


def test_the_command_lists_what_is_refused_and_why(capsys):
    command("--model llama-33b --tokens 4k --cluster a100x8 --forward")
    out = capsys.readouterr().out
    assert "Ulysses: 52 key heads do not divide among 8 ranks" in out
    assert "Megatron: 52 query heads do not divide among 8 ranks" in out


def test_linear_attention_stands_below_the_ranking_even_where_it_is_faster(capsys):
    command("--model llama-7b --tokens 128k --cluster a100x4 --forward")
    out = capsys.readouterr().out
    assert "another function" in out and "Best: LASP-2" not in out
    assert out.index("ring, contiguous") < out.index("LASP-2")
    assert float(out.split("LASP-2")[1].split()[2]) < 1


def test_the_command_says_when_nothing_fits(capsys):
    command("--model llama3-405b --tokens 4k --cluster a10x2")
    out = capsys.readouterr().out
    assert "No method can run this." in out and "state of the model" in out


@pytest.mark.parametrize(
    "arguments",
    [
        "--model x --tokens 1k --cluster h100x8",
        "--model llama-7b --tokens 1G --cluster h100x8",
        "--model llama-7b --tokens 1k --cluster h100x9",
    ],
)
def test_bad_arguments_are_value_errors_as_the_command_line_catches_them(arguments):
    with pytest.raises(ValueError):
        command(arguments)
