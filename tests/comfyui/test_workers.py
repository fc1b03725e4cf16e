"""Four ComfyUI processes on one broker, two of them remote and two attached, each with LoRAs of its own."""

from __future__ import annotations

from compare import assert_different, assert_equal, assert_near
from workers import STACKS, stacked

import broker as brokers
from memory import table

ROUNDS = 2


def test_concurrent_workers_paint_what_each_paints_alone(four, broker):
    graphs = {(name, at): stacked(name, broker.address, seed=at) for name in STACKS for at in range(ROUNDS)}
    alone = {(name, at): four[name].run(graph).ok() for (name, at), graph in graphs.items()}
    for name, other in zip(STACKS, [*STACKS][1:], strict=False):
        assert_different(alone[name, 0], alone[other, 0])
    before = brokers.verified(broker)
    assert before, "nothing was attached"

    for at in range(ROUNDS):
        prompts = {name: worker.queue(graphs[name, at]) for name, worker in four.items()}
        for name, worker in four.items():
            result = worker.wait(prompts[name]).ok()
            assert graphs[name, at].only("KSampler") in result.ran, "the worker answered with what it had kept"
            compare = assert_equal if name.startswith("attached") else assert_near
            compare(result, alone[name, at])
    assert brokers.verified(broker) == before, "somebody wrote to shared weights"
    assert all(weights["found"] == weights["expected"] for weights in before)


def test_a_further_worker_costs_next_to_nothing_of_the_weights(grown, broker, capsys):
    """Besides them a worker that paints costs what it costs idle, and its working memory; of that a stock one tells."""
    totals = {mode: growth.totals for mode, growth in grown.items()}
    with capsys.disabled():
        print("\n" + table("Sum of PSS, MiB, of the broker and", totals))
        print(", ".join(f"idle ({mode}): {growth.idle}" for mode, growth in grown.items()))
    weights = brokers.weights_mib(broker, "wide.safetensors")
    besides = grown["stock"].last - weights
    # Else what it is compared with has no weights of its own, and the comparison shows nothing.
    assert besides > 0.8 * grown["stock"].idle
    for mode in ("attached", "remote"):
        allowed = besides + 0.05 * weights
        assert grown[mode].last <= allowed, f"{mode}: {grown[mode].last} MiB, allowed are {allowed:.0f}"
