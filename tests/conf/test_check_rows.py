"""A row that nothing fits into is found before anything starts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from drivetrain.conf.check_data import data_problems
from drivetrain.conf.compose import compose
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import HELD_OUT, TRAIN, Manifest

Write = Callable[..., Path]
FROM = "model.init_from=somewhere"


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """`written(train, held_out, first, pairs)`: conversations of these lengths, in shards of two, whose tokens are
    learned from the `first` on."""

    def write(
        train: Sequence[int], held_out: Sequence[int] = (4, 4), first: int = 1, pairs: bool = False
    ) -> Path:
        infos = []
        for split, lengths in ((TRAIN, train), (HELD_OUT, held_out)):
            for at in range(0, len(lengths), 2):
                writer = ShardWriter(tmp_path, f"{split}_{at:05}", split, "uint16", weighted=True)
                for length in lengths[at : at + 2]:
                    weights = (np.arange(length) >= first).astype(np.uint8)
                    writer.add(np.zeros(length, dtype=np.uint16), weights)
                infos.append(writer.close())
        manifest = Manifest(
            dtype="uint16", vocab_size=9, eos_id=0, tokenizer_hash="a", shards=infos, pairs=pairs
        )
        manifest.write(tmp_path)
        return tmp_path

    return write


def problems(data: Path, *words: str) -> list[str]:
    return list(data_problems(compose([f"data.path={data}", FROM, *words])))


def test_one_conversation_that_fits_is_enough(written: Write) -> None:
    data = written([90, 70, 80, 64, 99, 99])
    assert problems(data, "stage=sft", "stage.seq_len=64") == []
    assert problems(data, "stage=sft", "stage.seq_len=63") == [
        f"data.path={data} has no training conversation of at most stage.seq_len=63 tokens, the shortest has 64; "
        "lengthen it, or use stage.too_long=truncate"
    ]
    assert problems(data, "stage=sft", "stage.seq_len=63", "stage.too_long=truncate") == []


def test_held_out_ones_count_where_they_are_read(written: Write) -> None:
    data = written([30, 30], held_out=[70, 80])
    words = ["stage=sft", "stage.seq_len=64"]
    assert problems(data, *words, "stage.eval_every=0") == []
    (problem,) = problems(data, *words)
    assert "has no held-out conversation of at most stage.seq_len=64 tokens, the shortest has 70" in problem


def test_what_is_cut_must_keep_something_to_learn(written: Write) -> None:
    data = written([90, 70, 80], held_out=[90], first=50)
    words = ["stage=sft", "stage.too_long=truncate"]
    assert problems(data, *words, "stage.seq_len=51") == []
    assert problems(data, *words, "stage.seq_len=50") == [
        f"data.path={data} has no {split} conversation with a learned token among its first stage.seq_len=50; "
        "lengthen it"
        for split in ("training", "held-out")
    ]


@pytest.mark.parametrize("stage", ["dpo", "reward_model"])
def test_a_pair_takes_the_room_of_both(stage: str, written: Write) -> None:
    data = written([50, 20, 40, 31], held_out=[4, 4], pairs=True)
    assert problems(data, f"stage={stage}", "stage.seq_len=70") == []
    assert problems(data, f"stage={stage}", "stage.seq_len=69") == [
        f"data.path={data} has no training pair of at most stage.seq_len=69 tokens, the shortest has 70; "
        "lengthen it"
    ]
