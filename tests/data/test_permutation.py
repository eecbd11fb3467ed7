import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.data.permutation import Permutation


def order(size: int, key: str) -> np.ndarray:
    return Permutation(size, key)(np.arange(size))


def sigmas(counts: np.ndarray) -> float:
    """How far a chi-squared statistic against equal counts lies above its mean, in standard deviations."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_every_size_to_two_thousand_is_a_bijection() -> None:
    for size in range(1, 2001):
        assert np.array_equal(np.sort(order(size, "all")), np.arange(size)), size


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200_000), st.text(max_size=20))
def test_any_size_and_key_is_a_bijection(size: int, key: str) -> None:
    assert np.bincount(order(size, key), minlength=size).tolist() == [1] * size


@settings(max_examples=60, deadline=None)
@given(st.integers(200_000, 1 << 62) | st.sampled_from([10**13, 1 << 62, (1 << 62) - 1]), st.integers(0, 99))
def test_samples_of_huge_sizes_stay_inside_and_never_meet(size: int, seed: int) -> None:
    index = np.unique(np.random.default_rng(seed).integers(0, size, 5000))
    image = Permutation(size, str(seed))(index)
    assert image.dtype == np.int64
    assert image.min() >= 0 and image.max() < size
    assert len(np.unique(image)) == len(index)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**15), st.integers(0, 99))
def test_an_image_does_not_depend_on_what_else_is_asked(size: int, seed: int) -> None:
    permutation = Permutation(size, "k")
    index = np.random.default_rng(seed).integers(0, size, (4, 6))
    together = permutation(index)
    assert together.shape == (4, 6)
    for place in np.ndindex(4, 6):
        assert permutation(index[place].reshape(1))[0] == together[place]


@pytest.mark.parametrize(("size", "keys"), [(2, 2000), (3, 2000), (7, 2000), (33, 1000), (100, 1000)])
def test_over_keys_each_element_goes_everywhere_equally_often(size: int, keys: int) -> None:
    places = np.zeros((size, size), np.int64)
    pairs = np.zeros((size, size), np.int64)
    for key in range(keys):
        image = order(size, str(key))
        places[np.arange(size), image] += 1
        np.add.at(pairs, (image[:-1], image[1:]), 1)
    assert sigmas(places) < 5
    assert sigmas(pairs[~np.eye(size, dtype=bool)]) < 5  # successors: all pairs but (x, x)


def test_over_keys_all_orders_of_four_are_equally_frequent() -> None:
    orders = [int("".join(map(str, order(4, str(key)))), 4) for key in range(4000)]
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 24 and sigmas(counts) < 5


@pytest.mark.parametrize("size", [1 << 20, 10**6, (1 << 19) + 1])
def test_one_order_mixes_far_and_near(size: int) -> None:
    image = order(size, "one")
    cell = image * 32 // size
    assert sigmas(np.bincount(np.arange(size) * 32 // size * 32 + cell, minlength=1024)) < 5
    assert sigmas(np.bincount(cell[:-1] * 32 + cell[1:], minlength=1024)) < 5
    steps = np.diff(image) % size
    assert sigmas(np.bincount(steps * 1000 // size, minlength=1000)) < 5
    assert sigmas(np.bincount(image[: size // 100 * 100] % 100, minlength=100)) < 5


def test_orders_of_different_keys_and_sizes_have_nothing_in_common() -> None:
    orders = [
        order(10_000, key) for key in ("0/web/epoch/0", "0/web/epoch/1", "1/web/epoch/0", "0/code/epoch/0")
    ]
    for one in range(4):
        for two in range(one):
            assert (orders[one] == orders[two]).sum() < 10  # one is expected by chance
    assert (order(10_000, "k") == order(10_001, "k")[:-1]).sum() < 10


@pytest.mark.parametrize(
    ("size", "images"),
    [
        (10, [4, 9, 8, 0, 7]),
        (1000, [349, 965, 46, 361, 198]),
        (10**6, [586622, 873437, 121445, 192328, 974912]),
        (10**13, [4868733940058, 7744798340377, 7832616484584, 8907906481842, 6628987646927]),
        (
            1 << 62,
            [
                2302107456907551381,
                945273515388305639,
                3616829265277718203,
                867173991800599341,
                1487865146753395308,
            ],
        ),
    ],
)
def test_the_order_never_changes_between_releases(size: int, images: list[int]) -> None:
    """A change here breaks every run that resumes: its data would come in another order."""
    index = np.array([0, 1, 2, size // 2, size - 1])
    assert Permutation(size, "golden")(index).tolist() == images


@pytest.mark.parametrize("size", [0, -1, (1 << 62) + 1])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 2\\^62"):
        Permutation(size, "k")
