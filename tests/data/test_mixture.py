import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.data.mixture import BLOCK, Mixture, Segment

# Weights of very different size, and many alike: both are hard to round.
some_weights = st.lists(
    st.floats(0.001, 1000) | st.sampled_from([1.0, 2.0, 3.0, 5.0]), min_size=1, max_size=12
)
weights_of = some_weights.map(lambda values: {f"s{place}": value for place, value in enumerate(values)})


def mixture(
    weights: dict[str, float], seed: int = 0, start: int = 0, before: dict[str, int] | None = None
) -> Mixture:
    return Mixture(Segment(start, weights, before or {}), seed)


def per_source(found: Mixture, first: int, last: int) -> dict[str, list[int]]:
    """Ordinals of each source in the samples first..last-1, in order."""
    sources, ordinals = found.assign(np.arange(first, last))
    return {name: ordinals[sources == place].tolist() for place, name in enumerate(found.names)}


@settings(max_examples=60, deadline=None)
@given(weights_of, st.integers(0, 10**10), st.integers(0, 5))
def test_counts_never_drift_from_the_exact_share(weights: dict[str, float], block: int, seed: int) -> None:
    found = mixture(weights, seed)
    total = sum(weights.values())
    counts = {}
    for number in (block, block + 1):
        counts[number] = found.consumed(number * BLOCK)
        assert sum(counts[number].values()) == number * BLOCK
        for name, weight in weights.items():
            exact = number * BLOCK * weight / total
            # Beyond 10^12 samples float64 itself is the coarser ruler.
            assert abs(counts[number][name] - exact) < 2 + 1e-12 * exact
    sources, _ = found.assign(np.arange(block * BLOCK, (block + 1) * BLOCK))
    for place, name in enumerate(found.names):
        inside = int((sources == place).sum())
        assert inside == counts[block + 1][name] - counts[block][name]
        assert abs(inside - BLOCK * weights[name] / total) < 4


def test_two_sources_are_within_one_in_every_block() -> None:
    found = mixture({"a": 0.7317, "b": 0.2683})
    sources, _ = found.assign(np.arange(200 * BLOCK))
    counts = sources.reshape(200, BLOCK).sum(axis=1)
    assert np.abs(counts - 0.2683 * BLOCK).max() <= 1
    exact = 0.2683 * BLOCK * np.arange(1, 201)
    assert np.abs(np.cumsum(counts) - exact).max() <= 0.5 + 1e-9


@settings(max_examples=40, deadline=None)
@given(weights_of, st.integers(1, 6000), st.integers(0, 5))
def test_each_source_counts_without_gap_or_repeat(weights: dict[str, float], samples: int, seed: int) -> None:
    found = mixture(weights, seed)
    counts = found.consumed(samples)
    for name, ordinals in per_source(found, 0, samples).items():
        assert ordinals == list(range(counts[name]))


@settings(max_examples=40, deadline=None)
@given(weights_of, st.sets(st.integers(1, 4999), max_size=8))
def test_an_assignment_does_not_depend_on_how_the_range_is_cut(
    weights: dict[str, float], cuts: set[int]
) -> None:
    whole = mixture(weights).assign(np.arange(5000))
    edges = [0, *sorted(cuts), 5000]
    again = mixture(weights)
    for first, last in reversed(list(itertools.pairwise(edges))):
        part = again.assign(np.arange(first, last))
        assert np.array_equal(part[0], whole[0][first:last]) and np.array_equal(part[1], whole[1][first:last])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.tuples(st.lists(st.floats(0.01, 10), min_size=n, max_size=n), st.integers(0, 3000)),
            min_size=2,
            max_size=4,
        )
    )
)
def test_other_weights_at_any_sample_go_on_where_each_source_was(
    history: list[tuple[list[float], int]],
) -> None:
    """Several resumes, each with other weights and through JSON, after any number of samples."""
    named = [({f"s{i}": w for i, w in enumerate(weights)}, length) for weights, length in history]
    seen: dict[str, list[int]] = {name: [] for name in named[0][0]}
    found, sample = mixture(named[0][0]), 0
    for weights, length in named:
        stored = json.loads(json.dumps(asdict(found.segment)))
        found = Mixture(Segment(**stored), 0).reweighted(weights, sample)
        for name, ordinals in per_source(found, sample, sample + length).items():
            seen[name] += ordinals
        sample += length
    for name, ordinals in seen.items():
        assert ordinals == list(range(len(ordinals)))
        assert found.consumed(sample)[name] == len(ordinals)


def test_the_same_weights_begin_no_new_segment() -> None:
    found = mixture({"a": 1.0, "b": 3.0})
    assert found.reweighted({"b": 3.0, "a": 1.0}, 700) is found
    other = found.reweighted({"a": 1.0, "b": 1.0}, 700)
    assert other.segment.start == 700 and sum(other.segment.before.values()) == 700
    sources, _ = other.assign(np.arange(700, 700 + BLOCK))
    assert np.bincount(sources).tolist() == [512, 512]


def test_a_source_of_next_to_no_weight_goes_on_where_it_was() -> None:
    found = mixture({"a": 1.0, "b": 1.0})
    before = found.consumed(1000)
    off = found.reweighted({"a": 1.0, "b": 1e-12}, 1000)
    assert per_source(off, 1000, 3000) == {"a": list(range(before["a"], before["a"] + 2000)), "b": []}
    on = off.reweighted({"a": 1e-12, "b": 1.0}, 3000)
    assert per_source(on, 3000, 4000) == {"a": [], "b": list(range(before["b"], before["b"] + 1000))}


def test_places_in_a_block_are_dealt_differently_each_time() -> None:
    def dealt(seed: int, block: int) -> list[int]:
        found = mixture({"a": 1.0, "b": 1.0}, seed)
        return found.assign(np.arange(block * BLOCK, (block + 1) * BLOCK))[0].tolist()

    deals = [dealt(0, 0), dealt(0, 1), dealt(1, 0)]
    for one in range(3):
        for two in range(one):
            agree = sum(x == y for x, y in zip(deals[one], deals[two], strict=True))
            assert 400 < agree < 624  # 512 by chance, deviation 16
    runs = sum(x != y for x, y in zip(deals[0], deals[0][1:], strict=False))
    assert 400 < runs < 624


def test_the_deal_never_changes_between_releases() -> None:
    sources, ordinals = mixture({"code": 0.25, "math": 0.05, "web": 0.7}, seed=1).assign(np.arange(12))
    assert sources.tolist() == [2, 2, 2, 1, 2, 2, 0, 2, 2, 2, 0, 0]
    assert ordinals.tolist() == [0, 1, 2, 0, 3, 4, 0, 5, 6, 7, 1, 2]


@pytest.mark.parametrize("samples", [[5, 1030, 1031, 70_000], [2048]])
def test_samples_far_apart_are_those_of_the_whole_range(samples: list[int]) -> None:
    weights = {"a": 2.0, "b": 1.0, "c": 0.1}
    whole = mixture(weights).assign(np.arange(max(samples) + 1))
    some = mixture(weights).assign(np.array(samples))
    assert np.array_equal(some[0], whole[0][samples]) and np.array_equal(some[1], whole[1][samples])
