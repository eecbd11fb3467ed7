"""Which tokens are learned, under templates of several families."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from drivetrain.conf.errors import ConfigError
from drivetrain.data.call_ids import short_id
from drivetrain.data.chat import Chat
from drivetrain.data.conversations import Conversation, conversation_of
from drivetrain.data.readers import Unusable

TEMPLATES = Path(__file__).with_name("templates")
SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "chatml_without_prompt": ["<|im_start|>", "<|im_end|>"],
    "thinking": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [
        *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ],
}
TEXT = 'Hello there, what is 1 + 2? It is 3, naïve 日本語 😀\n\n{"name": "add"} user assistant ' * 3
DATE = re.compile(r"Date: \d\d \w{3} \d{4}\n\n")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Words with the space before them, as Llama 2 and Mistral have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *fallback], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def chat_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Chat]:
    """`chat_of(template, words)` with the tokens that the template writes."""
    folder = tmp_path_factory.mktemp("chats")

    def make(template: str, words: Callable[[], Tokenizer] = byte_level) -> Chat:
        directory = folder / f"{template}_{words.__name__}"
        if not directory.exists():
            tokenizer = words()
            special = SPECIAL[template]
            tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
            tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
            # What trims offsets and puts a token first in real tokenizers: neither may count here.
            first = f"{special[0]} $A"
            tokenizer.post_processor = processors.Sequence(
                [
                    processors.ByteLevel(trim_offsets=True),
                    processors.TemplateProcessing(
                        single=first, special_tokens=[(special[0], tokenizer.token_to_id(special[0]))]
                    ),
                ]
            )
            directory.mkdir()
            tokenizer.save(str(directory / "tokenizer.json"))
            names = {"bos_token": special[0], "eos_token": {"content": special[1], "special": True}}
            (directory / "tokenizer_config.json").write_text(json.dumps(names))
            shutil.copy(TEMPLATES / f"{template}.jinja", directory / "chat_template.jinja")
        return Chat(directory)

    return make


def pieces(chat: Chat, record: dict[str, Any]) -> list[str]:
    """The rendered text in stretches that are read, learned, read, ...; every token belongs to one."""
    text, tokens, weights = chat.encode(conversation_of(record))
    encoding = chat.tokenizer.encode(text, add_special_tokens=False)
    assert encoding.ids == tokens.tolist() and len(tokens) == len(weights)
    stretches, learned, at = [""], 0, 0
    for (start, end), weight in zip(encoding.offsets, weights.tolist(), strict=True):
        if weight != learned:
            stretches.append("")
            learned = weight
        start = max(start, at)  # tokens of one character share it
        stretches[-1] += text[start:end]
        at = max(at, end)
    assert "".join(stretches) == text
    return stretches


def said(*turns: str, tools: Any = None, **more: Any) -> dict[str, Any]:
    """u: user, a: assistant, s: system, t: tool."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]
    return {"messages": messages, "tools": tools, **more}


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "there"},
        {"role": "user", "content": "1 + 2?"},
        CALL,
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3"},
    ],
    "tools": TOOLS,
}


def test_chatml(chat_of: Callable[..., Chat]) -> None:
    assert pieces(
        chat_of("chatml"), said("s:Be brief", "u:Hello", "a:There 😀", "u:naïve", "a:日本語\n")
    ) == [
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
        "There 😀<|im_end|>",
        "\n<|im_start|>user\nnaïve<|im_end|>\n<|im_start|>assistant\n",
        "日本語\n<|im_end|>",
        "\n",
    ]


def test_a_template_that_prompts_for_nothing(chat_of: Callable[..., Chat]) -> None:
    record = said("u:Hello", "a:assistant", "u:1", "a:2")
    assert pieces(chat_of("chatml_without_prompt"), record) == pieces(chat_of("chatml"), record)


def test_llama_3(chat_of: Callable[..., Chat]) -> None:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    found = pieces(chat_of("llama3"), said("s:Be brief", "u:Hello", "a: there ", "u:Hello", "a:Hello"))
    assert DATE.search(found[0]) and [DATE.sub("", piece) for piece in found] == [
        f"<|begin_of_text|>{head.format('system')}Be brief<|eot_id|>{head.format('user')}Hello<|eot_id|>"
        + head.format("assistant"),
        "there<|eot_id|>",
        f"{head.format('user')}Hello<|eot_id|>{head.format('assistant')}",
        "Hello<|eot_id|>",
    ]
    found = pieces(chat_of("llama3"), WITH_TOOLS)
    assert DATE.sub("", found[0]) == (
        f"<|begin_of_text|>{head.format('system')}<|eot_id|>{head.format('user')}"
        f"{json.dumps(TOOLS[0], indent=4)}\n\nHello<|eot_id|>{head.format('assistant')}"
    )
    assert found[1:] == [
        "there<|eot_id|>",
        f"{head.format('user')}1 + 2?<|eot_id|>{head.format('assistant')}",
        '{"name": "add", "parameters": {"a": 1}}<|eot_id|>',
        f"{head.format('ipython')}3<|eot_id|>{head.format('assistant')}",
        "It is 3<|eot_id|>",
    ]


@pytest.mark.parametrize("words", [byte_level, sentencepiece])
def test_mistral(chat_of: Callable[..., Chat], words: Callable[[], Tokenizer]) -> None:
    chat = chat_of("mistral", words)
    assert pieces(chat, said("s:Be brief", "u:Hello", "a:there", "u:what", "a:It is 3")) == [
        "<s>[INST] Be brief\n\nHello [/INST]",
        " there</s>",
        "[INST] what [/INST]",
        " It is 3</s>",
    ]


@pytest.mark.parametrize("words", [byte_level, sentencepiece])
def test_mistral_tools_come_before_the_last_question_alone(
    chat_of: Callable[..., Chat], words: Callable[[], Tokenizer]
) -> None:
    available = f"[AVAILABLE_TOOLS] {json.dumps(TOOLS)}[/AVAILABLE_TOOLS]"
    call_id = short_id("call 0 of message 3")
    assert pieces(chat_of("mistral", words), WITH_TOOLS) == [
        "<s>[INST] Hello [/INST]",
        " there</s>",
        f"{available}[INST] 1 + 2? [/INST]",
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {{"a": 1}}, "id": "{call_id}"}}]</s>',
        f'[TOOL_RESULTS] {{"content": "3", "call_id": "{call_id}"}}[/TOOL_RESULTS]',
        " It is 3</s>",
    ]


@pytest.mark.parametrize(
    "ids", [("call_Vy3", "call_9"), ("abcdefghi", "123456789"), (None, None), ('a"b', "7")]
)
def test_mistral_gets_ids_of_nine_characters(
    chat_of: Callable[..., Chat], ids: tuple[str | None, str | None]
) -> None:
    calls = [
        {**({"id": one} if one else {}), "function": {"name": "add", "arguments": {"a": 1}}} for one in ids
    ]
    replies = [{"role": "tool", "content": "3", **({"tool_call_id": one} if one else {})} for one in ids]
    answer = {"role": "assistant", "content": "It is 3"}
    messages = [*WITH_TOOLS["messages"][:1], {**CALL, "tool_calls": calls}, *replies, answer]
    text = "".join(pieces(chat_of("mistral"), {"messages": messages}))
    assert text == "".join(pieces(chat_of("mistral"), {"messages": messages}))
    called = re.findall(r'"id": "([0-9A-Za-z]{9})"', text)
    assert called == re.findall(r'"call_id": "([0-9A-Za-z]{9})"', text) and len(set(called)) == 2
    assert called == list(ids) or ids[0] != "abcdefghi"
    assert chat_of("mistral").prompt(conversation_of({"messages": messages}).messages[:-1])


def test_other_templates_get_the_ids_as_they_are(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "copy")
    ids = "{% for m in messages %}{{ m.tool_calls[0].id if m.tool_calls else m.tool_call_id }} {% endfor %}"
    (tmp_path / "copy" / "chat_template.jinja").write_text(ids)
    call = {"id": "call_Vy3", "function": {"name": "add"}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    messages.append({"role": "tool", "content": "3", "tool_call_id": "call_Vy3"})
    assert Chat(tmp_path / "copy").render(messages) == "call_Vy3 call_Vy3 "


def test_replies_of_tools_in_one_turn(chat_of: Callable[..., Chat]) -> None:
    twice = {**CALL, "tool_calls": CALL["tool_calls"] * 2}
    replies = [{"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}]
    answer = {"role": "assistant", "content": "It is 3"}
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    messages = [{"role": "user", "content": "what"}, twice, *replies, answer]
    assert pieces(chat_of("thinking"), {"messages": messages})[1:] == [
        f"{call}{call}<|im_end|>",
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nIt is 3<|im_end|>",
        "\n",
    ]


def test_thoughts_that_the_template_drops_from_earlier_turns(chat_of: Callable[..., Chat]) -> None:
    thought = {"role": "assistant", "content": "3", "reasoning_content": "1 + 2"}
    messages = [{"role": "user", "content": "what"}, thought, {"role": "user", "content": "what"}, thought]
    assert pieces(chat_of("thinking"), {"messages": messages}) == [
        "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n",
        "3<|im_end|>",
        "\n<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n1 + 2\n</think>\n\n3<|im_end|>",
        "\n",
    ]
    call = {**CALL, "reasoning": "a sum"}
    messages = [{"role": "user", "content": "what"}, call, {"role": "tool", "content": "3"}, thought]
    found = pieces(chat_of("thinking"), {"messages": messages})
    assert found[1] == (
        '<think>\na sum\n</think>\n\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    assert found[3] == "<think>\n1 + 2\n</think>\n\n3<|im_end|>"


words_ = st.sampled_from(
    ["Hello", "there", "what is", "1 + 2?", "assistant", "user", "naïve 日本語", "{}", "\n", "It"]
)
texts = st.lists(words_, min_size=1, max_size=4).map(" ".join).filter(str.strip)


@settings(max_examples=40)
@given(
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    template=st.sampled_from(["chatml", "chatml_without_prompt", "llama3", "mistral", "thinking"]),
)
def test_any_conversation_learns_its_answers_and_their_ends(
    chat_of: Callable[..., Chat], turns: list[tuple[str, str]], template: str
) -> None:
    chat = chat_of(template)
    found = pieces(chat, said(*(turn for u, a in turns for turn in (f"u:{u}", f"a:{a}"))))
    learned = [piece.removeprefix("<think>\n\n</think>\n\n").strip() for piece in found[1::2]]
    end = SPECIAL[template][-1] if template == "llama3" else SPECIAL[template][1]
    strip = str.strip if template in ("llama3", "mistral") else str
    assert learned == [(strip(answer) + end).strip() for _, answer in turns]


def test_the_marks_of_our_own_template_and_transformers_mask(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    chat, theirs = Chat(tokenizer), AutoTokenizer.from_pretrained(tokenizer)
    thought = {"role": "assistant", "content": "It is 3", "reasoning": "add"}
    record = {
        **WITH_TOOLS,
        "messages": [{"role": "system", "content": "s"}, *WITH_TOOLS["messages"], thought],
    }
    conversation = conversation_of(record)
    _, tokens, weights = chat.encode(conversation)
    made = theirs.apply_chat_template(
        conversation.messages, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    assert made["input_ids"] == tokens.tolist() and made["assistant_masks"] == weights.tolist()
    assert pieces(chat, record)[1::2] == [
        "there<|im_end|>",
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "It is 3<|im_end|>",
        "<think>\nadd\n</think>\n\nIt is 3<|im_end|>",
    ]
    asked = theirs.apply_chat_template(conversation.messages[:2], add_generation_prompt=True)["input_ids"]
    assert chat.prompt(conversation.messages[:2]) == asked
    assert chat.stop_id() == theirs.convert_tokens_to_ids("<|im_end|>")


def test_without_its_marks_our_template_learns_the_same(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "copy")
    path = tmp_path / "copy" / "chat_template.jinja"
    lines = [line for line in path.read_text().splitlines() if "generation %}" not in line]
    path.write_text("\n".join(lines))
    record = {**WITH_TOOLS, "messages": [{"role": "system", "content": "s"}, *WITH_TOOLS["messages"]]}
    assert pieces(Chat(tmp_path / "copy"), record) == pieces(Chat(tokenizer), record)


def test_turns_that_are_not_to_be_learned(chat_of: Callable[..., Chat], tokenizer: Path) -> None:
    record = said("u:Hello", "a:there", "u:what", "a:It")
    record["messages"][1]["weight"] = 0
    for chat in (chat_of("chatml"), Chat(tokenizer)):
        assert pieces(chat, record)[1::2] == ["It<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "record", "reason"),
    [
        ("chatml", said("u:<|im_end|>", "a:It"), r"message 1 spells the control token <\|im_end\|>"),
        ("llama3", {**WITH_TOOLS, "tools": [{"<|eot_id|>": 1}]}, None),
        ("mistral", said("a:Hello", "u:what", "a:It"), "the chat template refuses it .a user speaks first"),
        ("chatml", said("a:Hello", "u:what", "a:It"), "begins with the assistant"),
    ],
)
def test_what_cannot_be_learned_says_why(
    chat_of: Callable[..., Chat], template: str, record: dict[str, Any], reason: str | None
) -> None:
    with pytest.raises(Unusable, match=reason or "the tools spell the control token"):
        chat_of(template).encode(conversation_of(record))


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no chat template; add chat_template\.jinja"):
        Chat(tmp_path / "copy")
    with pytest.raises(ConfigError, match="does not exist"):
        Chat(tmp_path / "nowhere")


def test_named_templates_in_the_settings(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "copy" / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    chat = Chat(tmp_path / "copy")
    assert chat.render([]) == "plain" and chat.render([], TOOLS) == "tools"


def test_conversations_travel(chat_of: Callable[..., Chat]) -> None:
    import pickle

    conversation = conversation_of(WITH_TOOLS, "here")
    assert isinstance(conversation, Conversation) and pickle.loads(pickle.dumps(conversation)) == conversation
