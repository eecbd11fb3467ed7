"""Calls of functions: taken out of what a model writes, and as OpenAI's own client gets them."""

import importlib.resources
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Conversation
from drivetrain.data.tokenizer import train_tokenizer
from drivetrain.launch.tool_calls import Call, Part, ToolCalls

ONE = '<tool_call>\n{"name": "find", "arguments": {"what": "cat"}}\n</tool_call>'
CAT = Call("find", '{"what": "cat"}')
SNEAKY = r'<tool_call>{"name": "f", "arguments": {"text": "</tool_call> <tool_call>\n{"}}</tool_call>'

WRITTEN: dict[str, list[Part]] = {
    "no call": ["no call"],
    " a \n": [" a \n"],
    ONE: [CAT],
    f"Let me look.\n{ONE}": ["Let me look.", CAT],
    f"{ONE}\n{ONE}": [CAT, CAT],
    f"a {ONE} b\n": ["a", CAT, " b\n"],
    f"\n\n{ONE} \n": [CAT],
    SNEAKY: [Call("f", '{"text": "</tool_call> <tool_call>\\n{"}')],
    '<tool_call>{"name": "f"}</tool_call>': [Call("f", "{}")],
    '<tool_call>{"arguments": {"ü": "北\n"}, "name": "f"}</tool_call>': [Call("f", '{"ü": "北\\n"}')],
    # what is none
    "<tool_call": ["<tool_call"],
    "a <tool_call>": ["a <tool_call>"],
    "<tool_call>\n{find}\n</tool_call>": ["<tool_call>\n{find}\n</tool_call>"],
    '<tool_call>{"name": 1}</tool_call> a': ['<tool_call>{"name": 1}</tool_call> a'],
    '<tool_call>{"name": ""}</tool_call>': ['<tool_call>{"name": ""}</tool_call>'],
    '<tool_call>{"name": "f", "arguments": "x"}</tool_call>': [
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'
    ],
    '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>': [
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'
    ],
    '<tool_call>{"name": "\\ud800"}</tool_call>': ['<tool_call>{"name": "\\ud800"}</tool_call>'],
    "<tool_call>[]</tool_call>": ["<tool_call>[]</tool_call>"],
    f"<tool_call>{{</tool_call> {ONE}": ["<tool_call>{</tool_call>", CAT],
    f'<tool_call>{{"a</tool_call> {ONE}': ['<tool_call>{"a</tool_call>', CAT],
    f"<tool_call> {ONE}": ["<tool_call>", CAT],
    ONE[:-1]: [ONE[:-1]],
    "<tool_call>" + "[" * 100_000 + "</tool_call>": ["<tool_call>" + "[" * 100_000 + "</tool_call>"],
}


def read(pieces: list[str]) -> list[Part]:
    """Texts that follow each other as one."""
    parser = ToolCalls()
    found: list[Part] = []
    for part in [each for piece in pieces for each in parser.push(piece)] + parser.finish():
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("text", WRITTEN, ids=range(len(WRITTEN)))
def test_calls_are_taken_out_however_the_text_comes(text: str) -> None:
    assert read([text]) == WRITTEN[text]
    if len(text) < 1000:
        assert read(list(text)) == WRITTEN[text]


@given(
    st.lists(
        st.sampled_from(["a", " ", "\n", "<", "<tool_call>", "</tool_call>", "{", '"', "}", ONE, SNEAKY]),
        max_size=12,
    )
)
def test_pieces_are_read_as_the_whole(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = read(pieces)
    assert found == read([text]) == read(list(text))
    if not any(isinstance(part, Call) for part in found):
        assert "".join(found) == text  # type: ignore[arg-type]


def test_text_is_told_as_soon_as_no_call_can_begin_in_it() -> None:
    parser = ToolCalls()
    assert [parser.push(text) for text in ("a", " b", " ", "<", "b>", " \n<tool_", "cal", "m")] == [
        ["a"],
        [" b"],
        [],
        [],
        [" <b>"],
        [],
        [],
        [" \n<tool_calm"],
    ]


# --- over HTTP ----------------------------------------------------------------------------------------------

FIND: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}


def called(what: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "find", "arguments": {"what": what}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, *calls: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": [called(what) for what in calls]}


RESULT = {"role": "tool", "content": "on the mat"}
LOOK = [user("where is the cat?"), assistant("Let me look.", "cat")]
BROKEN = '<tool_call>\n{"name": find}\n</tool_call>'
LEARNED: list[tuple[list[dict[str, Any]], bool]] = [
    (LOOK, True),
    ([*LOOK, RESULT, assistant("It is on the mat.")], True),
    ([user("where are both?"), assistant("", "cat", "dog")], True),
    ([user("break it"), assistant(BROKEN)], True),
    ([user("where is the cat?"), assistant("Who knows?")], False),
]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that has learned `LEARNED` by heart, conversations with and without tools."""
    folder = tmp_path_factory.mktemp("caller") / "tiny"
    template = importlib.resources.files("drivetrain.data") / "chat_template.jinja"
    text = folder.parent / "text.txt"
    text.write_text((json.dumps([FIND, LEARNED]) + template.read_text()) * 5)
    train_tokenizer([text], 500, folder)
    chat = Chat(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    tokens = torch.zeros(len(LEARNED), 256, dtype=torch.int64)
    targets = torch.full_like(tokens, -100)  # transformers' for what is not learned
    for row, (turns, tools) in enumerate(LEARNED):
        learned = [turn["role"] == "assistant" for turn in turns]
        _, ids, weights = chat.encode(Conversation(turns, learned, [FIND] if tools else None))
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        targets[row, : len(ids)] = torch.from_numpy(np.where(weights, ids, -100))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(300):
        loss = model(tokens, labels=targets).loss
        if float(loss.detach()) < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(
    caller: Path, serve_tiny: Callable[..., Any], kill_tree: Callable[..., None]
) -> Iterator[openai.OpenAI]:
    running = serve_tiny(caller)
    yield running.client("none")
    kill_tree(running.process)


def ask(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    """The choice, which streamed is the same."""
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": messages,
        "temperature": 0,
        "tools": [FIND],
        **options,
    }
    (choice,) = client.chat.completions.create(**asked).choices
    with client.chat.completions.stream(**asked) as stream:
        (streamed,) = stream.get_final_completion().choices
    assert streamed.finish_reason == choice.finish_reason
    assert (streamed.message.content or None) == (choice.message.content or None)
    assert spelled(streamed) == spelled(choice)
    return choice


def spelled(choice: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]


def test_a_call_its_result_and_the_answer(client: openai.OpenAI) -> None:
    choice = ask(client, LOOK[:1])
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("find", {"what": "cat"})
    result = {**RESULT, "tool_call_id": call.id}
    answer = ask(client, [*LOOK[:1], choice.message.to_dict(), result], tool_choice="auto")
    assert (answer.finish_reason, answer.message.content) == ("stop", "It is on the mat.")
    assert answer.message.tool_calls is None


def test_several_calls_in_one_answer(client: openai.OpenAI) -> None:
    choice = ask(client, [user("where are both?")], logprobs=True)
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert spelled(choice) == [("find", '{"what": "cat"}'), ("find", '{"what": "dog"}')]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    told = "".join(token.token for token in choice.logprobs.content)
    assert told.count("<tool_call>") == 2


def test_a_malformed_call_is_plain_content(client: openai.OpenAI) -> None:
    choice = ask(client, [user("break it")])
    assert (choice.finish_reason, choice.message.content) == ("stop", BROKEN)
    assert choice.message.tool_calls is None


def test_a_call_that_is_cut_off_is_plain_content(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(
        model="tiny", messages=LOOK[:1], temperature=0, tools=[FIND], max_tokens=12
    ).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert choice.message.content.startswith("Let me look.\n<tool_call>")


@pytest.mark.parametrize("options", [{"tool_choice": "none"}, {"tools": []}])
def test_without_tools_there_are_no_calls(client: openai.OpenAI, options: dict[str, Any]) -> None:
    choice = ask(client, LOOK[:1], **options)
    assert (choice.finish_reason, choice.message.content) == ("stop", "Who knows?")


def test_a_template_without_tools_refuses_them(
    caller: Path, tmp_path: Path, serve_tiny: Callable[..., Any], kill_tree: Callable[..., None]
) -> None:
    source = shutil.copytree(caller, tmp_path / "tiny")
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    running = serve_tiny(source)
    try:
        asked: dict[str, Any] = {"model": "tiny", "messages": [user("a")], "max_tokens": 1}
        with pytest.raises(openai.BadRequestError, match="the model's chat template takes no tools"):
            running.client().chat.completions.create(**asked, tools=[FIND])
        assert running.client().chat.completions.create(**asked).choices
    finally:
        kill_tree(running.process)
