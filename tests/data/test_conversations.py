"""The shapes of chat data, and `data build --chat`."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.data.build import build
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import ConversationReader, conversation_of
from drivetrain.data.inspect import inspect, verify
from drivetrain.data.readers import Unusable
from drivetrain.data.shard_writer import ShardWriter
from drivetrain.data.shards import Manifest, map_lengths, map_tokens, map_weights

CALL = {"name": "add", "arguments": {"a": 1}}
ASKED = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize(
    ("record", "messages", "learned"),
    [
        ({"messages": ASKED}, ASKED, [False, True]),
        ({"messages": json.dumps(ASKED)}, ASKED, [False, True]),
        (
            {"conversations": [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}]},
            ASKED,
            [False, True],
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}],
            },
            [{"role": "system", "content": "s"}, *ASKED],
            [False, False, True],
        ),
        ({"prompt": "1 + 2?", "completion": "3"}, ASKED, [False, True]),
        ({"prompt": ASKED * 2, "completion": ASKED[1:]}, ASKED * 2 + ASKED[1:], [False] * 4 + [True]),
        ({"instruction": "1 + 2?", "input": "", "output": "3"}, ASKED, [False, True]),
        (
            {"instruction": "add", "input": "1", "output": "3", "system": "s", "history": [["1 + 2?", "3"]]},
            [
                {"role": "system", "content": "s"},
                *ASKED,
                {"role": "user", "content": "add\n\n1"},
                {"role": "assistant", "content": "3"},
            ],
            [False, False, True, False, True],
        ),
    ],
)
def test_the_usual_shapes(record: Any, messages: Any, learned: list[bool]) -> None:
    found = conversation_of(record)
    assert found.messages == messages and found.learned == learned and found.tools is None


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "a"}]',
        '[{"a": 1}] sum these',
        '[{"role": "user"}, {"a": 1}]',
        "[{",
        "[]",
        "[1, 2]",
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_text_that_only_looks_like_messages_is_a_text(text: str) -> None:
    found = conversation_of({"prompt": text, "completion": text})
    assert [message["content"] for message in found.messages] == [text, text]


def test_messages_in_a_text_are_messages() -> None:
    found = conversation_of({"prompt": f" {json.dumps(ASKED * 2)}", "completion": json.dumps(ASKED[1:])})
    assert found.messages == ASKED * 2 + ASKED[1:]
    found = conversation_of({"prompt": '[ {"from": "human", "value": "1 + 2?"}]', "completion": "3"})
    assert found.messages == ASKED


@pytest.mark.parametrize("tools", ["[]", " ", "null", [], None])
def test_no_tools_are_none(tools: Any) -> None:
    assert conversation_of({"messages": ASKED, "tools": tools}).tools is None


@pytest.mark.parametrize("calls", [[{"function": CALL}], CALL])
def test_tool_calls_may_be_json_in_a_text(calls: Any) -> None:
    said = {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}
    found = conversation_of({"messages": [ASKED[0], said]})
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]


@pytest.mark.parametrize("calls", ["", "[]", "null"])
def test_no_tool_calls_in_a_text_are_none(calls: str) -> None:
    assert conversation_of({"messages": [{**item, "tool_calls": calls} for item in ASKED]}).messages == ASKED


def test_history_may_be_json_in_a_text() -> None:
    record = {"instruction": "1 + 2?", "output": "3", "history": json.dumps([["1 + 2?", "3"]])}
    assert conversation_of(record).messages == ASKED * 2


@pytest.mark.parametrize("own", [[], [{"role": "System", "content": " s\n"}]])
@pytest.mark.parametrize(
    "shape",
    [
        {"messages": ASKED},
        {"conversations": ASKED},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
    ],
)
def test_a_system_beside_any_shape_is_read(shape: dict[str, Any], own: list[Any]) -> None:
    first = next(iter(shape))
    found = conversation_of({**shape, first: [*own, *shape[first]], "system": "s"})
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]
    assert found.messages[0]["content"].strip() == "s" and found.learned == [False, False, True]
    assert conversation_of({**shape, "system": ""}).messages == ASKED


def test_a_system_does_not_make_an_answer_of_the_prompt_learned() -> None:
    found = conversation_of({"system": "s", "prompt": ASKED * 2, "completion": "3"})
    assert found.learned == [False] * 5 + [True]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "1 + 2?", "response": "3"},
        {"instruction": "1 + 2?", "response": "3", "context": "", "category": "sums"},
        {"instruction": "1 +", "context": "2?", "response": "3"},
    ],
)
def test_an_answer_may_be_called_response(record: dict[str, Any]) -> None:
    found = conversation_of(record).messages
    assert " ".join(found[0]["content"].split()) == "1 + 2?" and found[1:] == ASKED[1:]


def test_roles_in_capitals() -> None:
    shouted = [{**item, "role": item["role"].capitalize()} for item in ASKED]
    assert conversation_of({"messages": shouted}).messages == ASKED
    calls = [{"from": "Human", "value": "?"}, {"from": "Function_Call", "value": json.dumps(CALL)}]
    assert "tool_calls" in conversation_of({"conversations": calls}).messages[1]


def test_calls_reasoning_parts_and_weights() -> None:
    record = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be "}, "brief"]},
            {"role": "user", "content": "?", "name": "ann", "tool_calls": None},
            {
                "role": "assistant",
                "content": None,
                "thinking": "hm",
                "weight": 0,
                "tool_calls": [
                    {"id": "7", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
                ],
            },
            {"role": "tool", "content": "3", "tool_call_id": "7"},
            {"role": "assistant", "content": "3", "weight": 1},
        ],
        "tools": json.dumps([CALL]),
    }
    found = conversation_of(record, "here")
    assert found.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "?", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "7", "type": "function", "function": CALL}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "7"},
        {"role": "assistant", "content": "3"},
    ]
    assert found.learned == [False, False, False, False, True]
    assert found.tools == [CALL] and found.where == "here" and len(found) > 0
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3"},
        ]
    }
    found = conversation_of(sharegpt)
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["x"], "not an object"),
        ({"text": "x"}, "no conversation; a record has one of messages, conversations, prompt, instruction"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "x"}, "messages is text that is not JSON"),
        ({"messages": ["x"]}, "messages is not a list of objects"),
        ({"messages": [{"role": "king", "content": "x"}]}, "message 1 has the role 'king'"),
        ({"messages": ASKED[:1]}, "no message of the assistant to learn"),
        ({"messages": [{**ASKED[1], "weight": 0}]}, "no message of the assistant to learn"),
        ({"messages": [{**ASKED[1], "weight": 0.5}]}, "message 1 has the weight 0.5; it can be 0 or 1"),
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": " "}]},
            "message 2, of the assistant, is empty",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has a content that is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]},
            "tool call without a function name",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "message 1 has tool arguments that are not JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": "f("}]}, "function_call that is not JSON"),
        ({"prompt": "x"}, "no completion or response"),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            "no completion or response; chosen and rejected are built with --pairs",
        ),
        ({"chosen": ASKED, "rejected": ASKED}, "prompt, instruction; chosen and rejected are built with"),
        ({"prompt": "x", "completion": {"role": "assistant"}}, "completion is not a list of objects"),
        ({"instruction": "x"}, "no output or response"),
        ({"messages": ASKED, "tools": "{"}, "tools is text that is not JSON"),
        ({"messages": ASKED, "tools": "[1]"}, "tools is not a list of objects"),
        (
            {"messages": [{"role": "assistant", "tool_calls": "[{"}]},
            "message 1 has tool_calls in a text that is not JSON",
        ),
        ({"messages": [{"role": None, "content": "x"}]}, "message 1 has the role None"),
        ({"messages": ASKED, "system": ["s"]}, "system must be text"),
        (
            {"messages": [{"role": "system", "content": "s"}, *ASKED], "system": "t"},
            "system and message 1, of the system too, differ; leave one of them",
        ),
        ({"instruction": 1, "output": "x"}, "instruction and input must be text"),
        ({"instruction": "x", "output": "x", "history": [["x"]]}, "history 1 is no pair"),
        ({"instruction": "x", "output": "x", "history": 5}, "history is not a list of pairs"),
    ],
)
def test_what_is_no_conversation_says_why(record: Any, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        conversation_of(record)
    assert reason in str(caught.value)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(
        "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    )
    return path


def answers(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": "the cat " * (i % 9 + 1)},
            ]
        }
        for i in range(count)
    ]


def test_shards_hold_every_conversation_with_its_weights(tokenizer: Path, tmp_path: Path) -> None:
    records = answers(300)
    source = write(tmp_path / "a.jsonl", records)
    for name, workers in (("one", 1), ("two", 2)):
        build(
            [source],
            tokenizer,
            tmp_path / name,
            workers,
            held_out=0.2,
            shard_tokens=2000,
            progress=False,
            chat=True,
        )
    manifest = Manifest.read(tmp_path / "one")
    assert manifest == Manifest.read(tmp_path / "two")  # digests of all files among it
    assert manifest.chat and len(manifest.split("train")) > 2 and manifest.split("held_out")
    chat, expected, found = Chat(tokenizer), [], []
    for record in records:
        _, tokens, weights = chat.encode(conversation_of(record))
        expected.append((tokens.tolist(), weights.tolist()))
    for shard in manifest.shards:
        ends = np.cumsum(map_lengths(tmp_path / "one", shard))[:-1]
        tokens, weights = (
            read(tmp_path / "one", shard, manifest.dtype) for read in (map_tokens, map_weights)
        )
        assert weights.sum() == shard.loss_tokens
        parts = zip(np.split(tokens, ends), np.split(weights, ends), strict=True)
        found += [(tokens.tolist(), weights.tolist()) for tokens, weights in parts]
    assert sorted(found) == sorted(expected)
    verify(tmp_path / "one", progress=False)
    train = inspect(tmp_path / "one")["splits"]["train"]
    assert train["documents"] > 200 and 0 < train["loss_tokens"] < train["tokens"]
    (tmp_path / "two" / "train_00001.weights").write_bytes(b"\2" * manifest.split("train")[1].tokens)
    with pytest.raises(DataError, match=r"train_00001\.weights has checksum"):
        verify(tmp_path / "two", progress=False)


def test_answers_to_one_question_are_on_one_side(tokenizer: Path, tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"the {j}"}]}
        for i in range(40)
        for j in range(3)
    ]
    source = write(tmp_path / "a.jsonl", records)
    manifest = build([source], tokenizer, tmp_path / "out", 1, held_out=0.4, progress=False, chat=True)
    counts = [shard.documents for shard in manifest.shards]
    assert len(counts) == 2 and all(count % 3 == 0 for count in counts)


BROKEN = ["{", {"messages": []}, {"messages": [{"role": "user", "content": "<|im_end|>"}, ASKED[1]]}]


def test_broken_lines_are_named_and_counted(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "a.jsonl", [{"messages": ASKED}, *BROKEN, {"messages": ASKED}])
    with caplog.at_level(logging.WARNING):
        manifest = build([source], tokenizer, tmp_path / "out", 1, held_out=0, progress=False, chat=True)
    assert manifest.skipped == {"empty": 0, "broken": 3}
    assert sum(shard.documents for shard in manifest.shards) == 2
    for line, why in ((2, "not JSON"), (3, "messages is empty"), (4, "message 1 spells the control token")):
        assert f"{source}, line {line}: {why}" in caplog.text


@pytest.mark.parametrize("broken", BROKEN)
def test_a_strict_build_ends_at_the_first_broken_line(broken: Any, tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"messages": ASKED}, broken])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*build without --strict"):
        build([source], tokenizer, tmp_path / "out", 1, strict=True, progress=False, chat=True)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_build_of_nothing_but_broken_lines_fails(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", BROKEN)
    with pytest.raises(DataError, match=r"0 empty and 3 broken \(first: .*line 1: not JSON"):
        build([source], tokenizer, tmp_path / "out", 1, progress=False, chat=True)


def test_parquet(tokenizer: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": ASKED, "source": "a"}, {"messages": ASKED[:1], "source": "b"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    manifest = build(
        [tmp_path / "a.parquet"], tokenizer, tmp_path / "out", 1, held_out=0, progress=False, chat=True
    )
    assert manifest.skipped["broken"] == 1 and manifest.shards[0].documents == 1
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}]), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet holds no conversations: its columns are text"):
        build([tmp_path / "b.parquet"], tokenizer, tmp_path / "none", 1, progress=False, chat=True)
    pair = pyarrow.Table.from_pylist([{"chosen": "x", "rejected": "y"}])
    pyarrow.parquet.write_table(pair, tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match="is needed; chosen and rejected are built with --pairs"):
        build([tmp_path / "c.parquet"], tokenizer, tmp_path / "none", 1, progress=False, chat=True)


def read_parquet(path: Path, rows: list[dict[str, Any]]) -> list[Any]:
    """The conversations of a file whose columns are those of all rows together."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return list(ConversationReader([path], strict=True))


def test_parquet_unites_the_keys_of_messages(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}]
    rows = [{"conversations": said, "system": "s"}, {"conversations": ASKED}, {"messages": ASKED}]
    found = read_parquet(tmp_path / "a.parquet", rows)
    assert [one.messages for one in found] == [[{"role": "system", "content": "s"}, *ASKED], ASKED, ASKED]


def test_parquet_unites_the_keys_of_tool_arguments(tmp_path: Path) -> None:
    def calls(*arguments: Any) -> dict[str, Any]:
        made = [{"function": {"name": "f", "arguments": one}} for one in arguments]
        return {"role": "assistant", "content": "", "tool_calls": made}

    tools = [
        {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}},
        {"name": "g", "parameters": {"properties": {"b": {"enum": ["x", None]}}}},
    ]
    given = [{"a": 1}, {"b": {"c": "x"}}, {"b": {"d": [None, 2]}}]
    rows = [
        {"messages": [ASKED[0], calls(*given)], "tools": tools},
        {"messages": [ASKED[0], calls({"a": 2}), {"role": "tool", "content": "3"}], "tools": tools[:1]},
    ]
    one, other = read_parquet(tmp_path / "a.parquet", rows)
    assert [call["function"]["arguments"] for call in one.messages[1]["tool_calls"]] == given
    assert other.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"a": 2}}}
    ]
    assert (one.tools, other.tools) == (tools, tools[:1])


def test_a_null_that_was_meant_stays_in_a_text(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": json.dumps({"a": None})}
    messages = [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    (found,) = read_parquet(tmp_path / "a.parquet", [{"messages": messages}])
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_text_files_hold_no_conversations(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds no conversations; give JSON lines or Parquet"):
        build([tmp_path / "a.txt"], tokenizer, tmp_path / "out", 1, progress=False, chat=True)


def test_a_weighted_shard_takes_weights_and_another_none(tmp_path: Path) -> None:
    tokens = np.arange(3)
    with ShardWriter(tmp_path, "a", "train", "uint16", weighted=True) as writer:
        for weights in (None, np.ones(2, np.uint8), np.array([0, 1, 2], np.uint8)):
            with pytest.raises(ValueError, match="weights"):
                writer.add(tokens, weights)
        writer.add(tokens, np.array([0, 1, 1], np.uint8))
    assert writer.info.loss_tokens == 2 and (tmp_path / "a.weights").read_bytes() == b"\0\1\1"
    with ShardWriter(tmp_path, "b", "train", "uint16") as writer:
        with pytest.raises(ValueError, match="takes none"):
            writer.add(tokens, np.ones(3, np.uint8))
        writer.add(tokens)
    assert not (tmp_path / "b.weights").exists() and writer.info.loss_tokens is None
