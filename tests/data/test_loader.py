import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.conf.errors import CheckpointError, DataError
from drivetrain.conf.schema import DataConfig, SourceConfig
from drivetrain.data.batch import Batch
from drivetrain.data.loader import Prefetcher, PretrainSource, share_of
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import Manifest

SEQ_LEN, PER_STEP = 4, 24


def write(directory: Path, first: int, tokens: int, eos: int = 0) -> str:
    """One shard, whose token i is first + i, so that a window tells where it lay."""
    directory.mkdir(parents=True)
    with ShardWriter(directory, "train_00000", "train", "uint16") as writer:
        writer.add(np.arange(first, first + tokens))
    Manifest(dtype="uint16", vocab_size=60_000, eos_id=eos, tokenizer_hash="ab", shards=[writer.info]).write(
        directory
    )
    return str(directory)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three sources: web from 1,000 on, code from 20,000, math from 40,000."""
    folder = tmp_path_factory.mktemp("mixed")
    paths = {
        "web": write(folder / "web", 1000, 8001),
        "code": write(folder / "code", 20_000, 4001),
        "math": write(folder / "math", 40_000, 401),
    }
    return weighted({name: SourceConfig(path=path) for name, path in paths.items()}, web=6, code=3, math=1)


def weighted(sources: dict[str, SourceConfig], **weights: float) -> DataConfig:
    return DataConfig(
        mixture={name: SourceConfig(path=sources[name].path, weight=w) for name, w in weights.items()}
    )


def source_of(
    data: DataConfig,
    *,
    micro_batch: int = PER_STEP,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    state: dict[str, Any] | None = None,
) -> PretrainSource:
    return PretrainSource(data, SEQ_LEN, share_of(PER_STEP, micro_batch, rank, world), seed, state)


def firsts(batches: list[Batch]) -> list[int]:
    """The first token of every window: which windows these are."""
    return [int(token) for batch in batches for token in batch.tokens_T.view(-1, SEQ_LEN)[:, 0]]


def digest(batches: list[Batch]) -> int:
    return sum(batch.digest for batch in batches) % (1 << 64)


def stored(source: PretrainSource) -> dict[str, Any]:
    return json.loads(json.dumps(source.state()))  # type: ignore[no-any-return]


@settings(max_examples=30, deadline=None)
@given(world=st.sampled_from([1, 2, 3, 4, 8, 24]), micro_batch=st.integers(1, 24), seed=st.integers(0, 20))
@pytest.mark.parametrize("single", [False, True])
def test_a_steps_data_depends_on_seed_and_step_alone(
    mixed: DataConfig, single: bool, world: int, micro_batch: int, seed: int
) -> None:
    data = DataConfig(path=mixed.mixture["code"].path) if single else mixed
    one = source_of(data, seed=seed)
    ranks = [source_of(data, micro_batch=micro_batch, rank=r, world=world, seed=seed) for r in range(world)]
    for _ in range(3):
        whole = one.next_step()
        parts = [rank.next_step() for rank in ranks]
        assert all(
            batch.tokens <= micro_batch * SEQ_LEN and batch.row_len == SEQ_LEN
            for part in parts
            for batch in part
        )
        assert [window for part in parts for window in firsts(part)] == firsts(whole)
        assert sum(map(digest, parts)) % (1 << 64) == digest(whole)
    assert all(rank.state() == one.state() for rank in ranks)


def test_an_epoch_is_every_window_once(tmp_path: Path) -> None:
    data = DataConfig(path=write(tmp_path / "data", 1, PER_STEP * 5 * SEQ_LEN + 1))
    source = source_of(data)
    epochs = [sorted(w for _ in range(5) for w in firsts(source.next_step())) for _ in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] == list(range(1, PER_STEP * 5 * SEQ_LEN, SEQ_LEN))


def test_seeds_and_steps_differ(mixed: DataConfig) -> None:
    source = source_of(mixed)
    digests = {digest(source.next_step()) for _ in range(20)}
    assert len(digests) == 20
    assert digest(source_of(mixed, seed=1).next_step()) not in digests


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("stop", [0, 1, 47])
def test_a_stored_state_goes_on_alike_on_any_ranks(mixed: DataConfig, stop: int, world: int) -> None:
    straight = source_of(mixed)
    for _ in range(stop):
        straight.next_step()
    state = stored(straight)
    ranks = [source_of(mixed, micro_batch=2, rank=r, world=world, state=state) for r in range(world)]
    for _ in range(50):  # past the end of a block of the mixture, and of an epoch of math
        expected = straight.next_step()
        assert [w for rank in ranks for w in firsts(rank.next_step())] == firsts(expected)
    assert stored(ranks[0]) == stored(straight)


def test_other_weights_at_a_resume_go_on_where_each_source_was(mixed: DataConfig) -> None:
    first = source_of(mixed)
    seen = [w for _ in range(7) for w in firsts(first.next_step())]
    other = weighted(mixed.mixture, code=6, math=1, web=1)
    second = source_of(other, state=stored(first))
    later = [w for _ in range(30) for w in firsts(second.next_step())]
    for begin, end in ((1000, 20_000), (20_000, 40_000)):  # web and code, whose epochs have not ended
        windows = [w for w in seen + later if begin <= w < end]
        assert len(set(windows)) == len(windows)
    share = sum(20_000 <= w < 40_000 for w in later) / len(later)
    assert share == pytest.approx(6 / 8, abs=0.03)
    # A third segment begins in the middle of the second's block, and a plain resume begins none.
    assert stored(second)["segment"]["start"] == 7 * PER_STEP
    assert stored(source_of(other, state=stored(second))) == stored(second)
    third = source_of(mixed, state=stored(second))
    assert stored(third)["segment"]["start"] == 37 * PER_STEP
    assert sum(stored(third)["segment"]["before"].values()) == 37 * PER_STEP


def test_each_source_alone_is_its_stream_in_a_mixture(mixed: DataConfig) -> None:
    """A mixture deals out the same stream that its source gives with any other weights."""
    orders = []
    for weights in ({"web": 1.0, "code": 1.0, "math": 1.0}, {"web": 1.0, "code": 50.0, "math": 0.1}):
        source = source_of(weighted(mixed.mixture, **weights))
        orders.append(
            [w for _ in range(20) for w in firsts(source.next_step()) if 20_000 <= w < 40_000][:100]
        )
    assert orders[0] == orders[1] and len(orders[0]) == 100


def test_other_names_at_a_resume_are_refused(mixed: DataConfig) -> None:
    state = stored(source_of(mixed))
    with pytest.raises(CheckpointError, match=r"\['code', 'math', 'web'\], this run names \['code', 'web'\]"):
        source_of(weighted(mixed.mixture, web=1, code=1), state=state)


def test_sources_of_different_tokenizers_are_refused(mixed: DataConfig, tmp_path: Path) -> None:
    sources = {**mixed.mixture, "odd": SourceConfig(path=write(tmp_path / "odd", 1, 100, eos=2))}
    with pytest.raises(DataError, match=r"different tokens: \[0, 2\]"):
        source_of(weighted(sources, web=1, odd=1))


def test_sources_of_uint16_and_int32_mix(mixed: DataConfig, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train_00000", "train", "int32") as writer:
        writer.add(np.arange(100_000, 104_001))
    Manifest(dtype="int32", vocab_size=200_000, eos_id=0, tokenizer_hash="ab", shards=[writer.info]).write(
        tmp_path
    )
    sources = {**mixed.mixture, "wide": SourceConfig(path=str(tmp_path))}
    found = firsts(source_of(weighted(sources, web=1, wide=1)).next_step())
    assert {window >= 100_000 for window in found} == {True, False}


class Counting:
    """A source that counts, and fails at step `fails`."""

    def __init__(self, fails: int | None = None) -> None:
        self.step, self.fails = 0, fails

    def next_step(self) -> list[Batch]:
        self.step += 1
        if self.step == self.fails:
            raise DataError("train_00001.bin is missing")
        empty = torch.empty(0)
        tokens = torch.tensor([self.step])
        return [
            Batch(
                tokens_T=tokens,
                targets_T=empty,
                positions_T=empty,
                loss_weights_T=empty,
                cu_seqlens=empty,
                max_seqlen=0,
                row_len=1,
            )
        ]

    def state(self) -> dict[str, Any]:
        return {"sample": self.step}


def test_the_prefetchers_state_is_that_of_the_steps_handed_out(
    wait_until: Callable[[Callable[[], object]], None],
) -> None:
    source = Counting()
    reader = Prefetcher(source, depth=3)
    wait_until(lambda: source.step >= 4)  # three in the queue, one in hand
    assert reader.state() == {"sample": 0}
    for step in range(1, 6):
        assert reader.next_step()[0].tokens_T.tolist() == [step]
        assert reader.state() == {"sample": step}
    wait_until(lambda: source.step == 9)
    time.sleep(0.05)
    assert source.step == 9  # and never more than depth + 1 ahead
    reader.close()


def test_a_prefetched_run_is_the_run(mixed: DataConfig) -> None:
    plain, reader = source_of(mixed), Prefetcher(source_of(mixed), depth=2)
    for _ in range(10):
        assert firsts(reader.next_step()) == firsts(plain.next_step())
        assert reader.state() == plain.state()
    reader.close()


def test_prepare_runs_on_every_batch() -> None:
    prepared: list[str] = []

    def prepare(batch: Batch) -> Batch:
        prepared.append(threading.current_thread().name)
        return batch

    reader = Prefetcher(Counting(), depth=1, prepare=prepare)
    reader.next_step()
    reader.close()
    assert set(prepared) == {"prefetch"}


def test_an_error_is_raised_where_the_step_is_asked_for_and_again() -> None:
    reader = Prefetcher(Counting(fails=3), depth=2)
    assert [reader.next_step()[0].tokens_T.item() for _ in range(2)] == [1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match="train_00001"):
            reader.next_step()
    assert reader.state() == {"sample": 2}
    reader.close()


@pytest.mark.parametrize("taken", [0, 2])
def test_close_ends_the_thread(taken: int) -> None:
    before = threading.active_count()
    reader = Prefetcher(Counting(), depth=1)
    for _ in range(taken):
        reader.next_step()
    reader.close()
    assert threading.active_count() == before
    reader.close()
