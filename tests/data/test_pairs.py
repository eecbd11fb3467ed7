"""Preference pairs: the shapes they come in, their shards, and the rows and batches that are made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.conf.schema import DataConfig, TooLong
from drivetrain.data.build import build
from drivetrain.data.loader import share_of
from drivetrain.data.packing import Conversations
from drivetrain.data.pairs import PairReader, pair_of
from drivetrain.data.preference import PairBatch, Pairs, PairSource, batch_from_pairs
from drivetrain.data.readers import Unusable
from drivetrain.data.sft import SftSource
from drivetrain.data.shards import Manifest
from drivetrain.data.tokenizer import train_tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts(messages: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in messages]


SHAPES = {
    "texts": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "messages": {"prompt": [user("hi")], "chosen": [said("yes")], "rejected": [said("no")]},
    "implicit messages": {"chosen": [user("hi"), said("yes")], "rejected": [user("hi"), said("no")]},
    "implicit texts": {"chosen": "hi yes", "rejected": "hi no"},
    "a prompt beside whole conversations": {
        "prompt": "hi",
        "chosen": [user("hi"), said("yes")],
        "rejected": [user("hi"), said("no")],
    },
    "JSON in texts": {
        "prompt": json.dumps([user("hi")]),
        "chosen": json.dumps([said("yes")]),
        "rejected": json.dumps([said("no")]),
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_pair(shape: str) -> None:
    pair = pair_of(SHAPES[shape])
    assert texts(pair.chosen.messages) == ["user: hi", "assistant: yes"]
    assert texts(pair.rejected.messages) == ["user: hi", "assistant: no"]
    assert pair.chosen.learned == pair.rejected.learned == [False, True]


def test_texts_that_only_look_like_messages_are_texts() -> None:
    pair = pair_of({"chosen": '[{"a": 1}] sum these: 1', "rejected": '[{"a": 1}] sum these: 2'})
    assert texts(pair.chosen.messages) == ['user: [{"a": 1}] sum these:', "assistant: 1"]
    pair = pair_of({"prompt": "list", "chosen": '[{"name": "a"}]', "rejected": "[{"})
    assert texts(pair.chosen.messages) == ["user: list", 'assistant: [{"name": "a"}]']
    assert texts(pair.rejected.messages) == ["user: list", "assistant: [{"]


def test_a_system_beside_a_pair_is_read() -> None:
    for shape in SHAPES.values():
        pair = pair_of({**shape, "system": "s"})
        for side, answer in ((pair.chosen, "yes"), (pair.rejected, "no")):
            assert texts(side.messages) == ["system: s", "user: hi", f"assistant: {answer}"]
            assert side.learned == [False, False, True]


def test_parquet_unites_the_keys_of_messages(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    answers = [{"from": "gpt", "value": "yes"}, said("yes")]
    rows = [
        {"prompt": "hi", "system": None, "chosen": [answer], "rejected": [said("no")]} for answer in answers
    ]
    rows.append({**SHAPES["implicit messages"], "system": "s"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [texts(pair.chosen.messages) for pair in PairReader([tmp_path / "a.parquet"], strict=True)]
    plain = ["user: hi", "assistant: yes"]
    assert found == [plain, plain, ["system: s", *plain]]


def test_what_both_begin_with_is_not_learned() -> None:
    both = [user("a"), said("b"), user("c")]
    pair = pair_of({"chosen": [*both, said("d"), user("e"), said("f")], "rejected": [*both, said("g")]})
    assert pair.chosen.learned == [False, False, False, True, False, True]
    assert pair.rejected.learned == [False, False, False, True]
    words = pair_of({"chosen": "one two three", "rejected": "one two thirty"})
    assert texts(words.chosen.messages) == ["user: one two", "assistant: three"]  # whole words


WRONG = {
    "not an object with keys": [1],
    "no rejected answer; a record has chosen and rejected, and most often prompt": {"chosen": "a"},
    "chosen and rejected are the same": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "chosen and rejected share no first word, and there is no prompt": {"chosen": "a", "rejected": "b"},
    "chosen and rejected share no first message, and there is no prompt": {
        "chosen": [user("a"), said("b")],
        "rejected": [user("c"), said("b")],
    },
    "one of chosen and rejected is the beginning of the other": {
        "chosen": [user("a"), said("b")],
        "rejected": [user("a")],
    },
    "rejected: message 2, of the assistant, is empty": {"prompt": "a", "chosen": "b", "rejected": " "},
    "chosen: no message of the assistant to learn": {
        "prompt": "a",
        "chosen": [{"role": "tool", "content": "b"}],
        "rejected": "c",
    },
}


@pytest.mark.parametrize("why", WRONG)
def test_what_is_no_pair_says_why(why: str) -> None:
    with pytest.raises(Unusable) as caught:
        pair_of(WRONG[why])
    assert str(caught.value) == why


# --- shards -------------------------------------------------------------------------------------------------


def records() -> list[dict[str, Any]]:
    return [
        {"prompt": f"say {n}", "chosen": "yes " * (1 + n % 7), "rejected": "no " * (1 + n * 5 % 11)}
        for n in range(90)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    lines = [json.dumps(record) for record in records()]
    lines[40:40] = ['{"prompt": "a", "chosen": "<|im_end|>", "rejected": "b"}', "{}"]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "a.txt").write_text(" say yes no user assistant" * 30)
    train_tokenizer([folder / "a.txt"], 280, folder / "tokenizer")
    for workers, name in ((1, "shards"), (2, "again")):
        build(
            *([folder / "a.jsonl"], folder / "tokenizer", folder / name, workers),
            held_out=0.2,
            shard_tokens=400,
            progress=False,
            pairs=True,
        )
    return folder


def test_both_of_a_pair_lie_side_by_side_in_one_shard(built: Path) -> None:
    manifest = Manifest.read(built / "shards")
    assert manifest.pairs and manifest.skipped == {"empty": 0, "broken": 2}
    assert len(manifest.split("train")) > 2 and all(shard.documents % 2 == 0 for shard in manifest.shards)
    again = Manifest.read(built / "again")
    assert [shard.files for shard in again.shards] == [shard.files for shard in manifest.shards]
    splits = {split: Pairs(built / "shards", split) for split in ("train", "held_out")}
    assert sum(len(pairs) for pairs in splits.values()) == 90 and len(splits["held_out"]) > 5

    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(built / "shards" / "tokenizer" / "tokenizer.json")).decode
    found = []
    for pairs in splits.values():
        for number in range(len(pairs)):
            both = pairs.both(number)
            assert pairs.lengths(np.array([number])) == sum(len(tokens) for tokens, _ in both)
            found.append([decode(tokens[weights == 1].tolist()) for tokens, weights in both])
    expected = [[record["chosen"], record["rejected"]] for record in records()]
    strip = [[text.strip() for text in pair] for pair in found]
    assert sorted(strip) == sorted([text.strip() for text in pair] for pair in expected)


def test_parquet_is_read_like_json_lines(built: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{**SHAPES["messages"], "score": 1.0}, {"prompt": None, **SHAPES["implicit messages"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    manifest = build(
        *([tmp_path / "a.parquet"], built / "tokenizer", tmp_path / "out", 1),
        held_out=0,
        progress=False,
        pairs=True,
    )
    assert manifest.shards[0].documents == 4
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="holds no preference pairs: its columns are text, and chosen and"):
        build([tmp_path / "b.parquet"], built / "tokenizer", tmp_path / "b", 1, pairs=True)


def test_pairs_and_conversations_are_not_taken_for_each_other(built: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="holds preference pairs; build it with `drivetrain data build --chat`"
    ):
        Conversations(built / "shards", "train")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [user("a"), said("b")]}) + "\n")
    build(
        *([tmp_path / "a.jsonl"], built / "tokenizer", tmp_path / "chat", 1),
        held_out=0,
        progress=False,
        chat=True,
    )
    with pytest.raises(DataError, match="holds conversations; build it with `drivetrain data build --pairs`"):
        Pairs(tmp_path / "chat", "train")
    with pytest.raises(ConfigError, match="--chat and --pairs are both given"):
        build([tmp_path / "a.jsonl"], built / "tokenizer", tmp_path / "x", 1, chat=True, pairs=True)
    source = DataConfig(path=str(built / "shards"))
    with pytest.raises(DataError, match=r"pairs of .* have, both conversations together, more than"):
        PairSource(source, 8, share_of(4, 1, 0, 1), 0)
    with pytest.raises(DataError):
        SftSource(source, 128, TooLong.drop, share_of(4, 1, 0, 1), 0)


# --- rows and batches ---------------------------------------------------------------------------------------


def test_a_batch_by_hand(built: Path) -> None:
    pairs = Pairs(built / "shards", "train")
    pairs.reference = np.arange(2 * len(pairs), dtype=np.float32).reshape(-1, 2)
    batch = batch_from_pairs([(pairs, [3, 1]), (pairs, [0])], 256, pad_id=0)
    both = [part for number in (3, 1, 0) for part in pairs.both(number)]
    lengths = [len(tokens) for tokens, _ in both]
    begins = [0, lengths[0], sum(lengths[:2]), sum(lengths[:3]), 256, 256 + lengths[4]]
    assert batch.starts_P.tolist() == begins[0::2]
    assert batch.ends_P2.flatten().tolist() == [at + n - 1 for at, n in zip(begins, lengths, strict=True)]
    learned = [begins[i] + at for i, (_, weights) in enumerate(both) for at in np.flatnonzero(weights[1:])]
    assert batch.learned_Q.tolist() == learned
    assert batch.counts_P2.flatten().tolist() == [int(weights[1:].sum()) for _, weights in both]
    assert batch.weights_P.tolist() == [1, 1, 1] and batch.loss_weights_T.sum() == 3
    assert batch.reference_P2.tolist() == [[6, 7], [2, 3], [0, 1]]
    assert batch.tokens_T[batch.ends_P2[1, 1]] == both[3][0][-1]
    assert isinstance(batch.to(torch.device("cpu")), PairBatch)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_step_is_the_same_on_any_ranks_and_micro_batches(built: Path, data: st.DataObject) -> None:
    """Whole pairs in every micro-batch; together the pairs, their digests and their loss weights of the step."""
    ranks = data.draw(st.sampled_from([1, 2, 4]))
    micro_batch = data.draw(st.sampled_from([size for size in (1, 2, 4, 8) if size <= 8 // ranks]))
    seed = data.draw(st.integers(0, 3))
    cfg = DataConfig(path=str(built / "shards"))

    def step(rank: int, world: int, rows: int) -> list[Any]:
        source = PairSource(cfg, 128, share_of(8, rows, rank, world), seed)
        source.next_step()
        state = source.state()
        batches = PairSource(cfg, 128, share_of(8, rows, rank, world), seed, state).next_step()
        assert [b.digest for b in source.next_step()] == [b.digest for b in batches]  # resumed or not
        return batches

    whole = step(0, 1, 8)
    parts = [batch for rank in range(ranks) for batch in step(rank, ranks, micro_batch)]
    assert sum(batch.digest for batch in parts) % (1 << 64) == whole[0].digest
    assert sum(float(batch.loss_weights_T.sum()) for batch in parts) == len(whole[0].starts_P)
    assert all(len(batch.starts_P) == len(batch.counts_P2) == len(batch.ends_P2) for batch in parts)
    counts = torch.cat([batch.counts_P2 for batch in parts])
    assert torch.equal(counts, whole[0].counts_P2) and int(counts.min()) >= 1
    assert torch.equal(torch.cat([batch.tokens_T for batch in parts]), whole[0].tokens_T)
