"""Texts and conversations as requests."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, processors

from drivetrain.conf.errors import ConfigError
from drivetrain.data.readers import Unusable
from drivetrain.data.tokenizer import bos_id, load_tokenizer, text_ids, train_tokenizer
from drivetrain.model.draw import Sampling
from drivetrain.train.prompts import Prompts

ASKED: list[dict[str, Any]] = [{"role": "user", "content": "the cat"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Where it is.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "a.txt").write_text("the cat sat on the mat; " * 20)
    train_tokenizer([folder / "a.txt"], 270, folder / "tok")
    return folder / "tok"


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def prompts(directory: Path, tokenizer: Tokenizer) -> Prompts:
    return Prompts(directory, tokenizer, tokenizer.token_to_id("<|endoftext|>"))


def with_template(directory: Path, template: str | None, to: Path) -> Prompts:
    shutil.copytree(directory, to)
    (to / "chat_template.jinja").unlink()
    if template is not None:
        (to / "chat_template.jinja").write_text(template)
    return Prompts(to, load_tokenizer(to), 0)


def spelled(tokenizer: Tokenizer, tokens: Any) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False)


def test_a_text_is_continued_and_an_empty_one_begins_a_document(
    prompts: Prompts, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("the cat").ids
    for given in ("the cat", ids):
        request = prompts.continued(given, Sampling(max_tokens=5), 3)
        assert (list(request.prompt), request.samples, request.sampling.max_tokens) == (ids, 3, 5)
        assert request.sampling.stop_tokens == ()
    for empty in ("", []):
        assert prompts.continued(empty, Sampling()).prompt == [tokenizer.token_to_id("<|endoftext|>")]


@pytest.fixture(params=["add_bos_token", "a template", "a template that ends texts too", "neither"])
def begins(request: pytest.FixtureRequest, directory: Path, tmp_path: Path) -> Path:
    """Tokenizers that say in each of the ways whether texts begin with <s>."""
    shutil.copytree(directory, folder := tmp_path / "tokenizer")
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([AddedToken("<s>", special=True)])
    if request.param.startswith("a template"):
        ids = [(token, made.token_to_id(token)) for token in ("<s>", "<|endoftext|>")]
        single = "<s> $A" if request.param == "a template" else "<s> $A <|endoftext|>"
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    made.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<s>", "add_bos_token": request.param == "add_bos_token"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_text_begins_as_it_does_in_training(begins: Path) -> None:
    tokenizer = load_tokenizer(begins)
    prompts, bos = Prompts(begins, tokenizer, tokenizer.token_to_id("<|endoftext|>")), bos_id(begins)
    cat = tokenizer.encode("the cat", add_special_tokens=False).ids
    first = [] if bos is None else [tokenizer.token_to_id("<s>")]
    for text, ids in {
        "the cat": [*first, *cat],
        "<s>the cat": [tokenizer.token_to_id("<s>"), *cat],  # never twice
        "": first or [tokenizer.token_to_id("<|endoftext|>")],
    }.items():
        assert prompts.continued(text, Sampling()).prompt == ids
        assert text_ids(tokenizer, bos, text) == (ids if text or first else [])
    assert prompts.continued(cat, Sampling()).prompt == cat  # token ids are taken as they are


@pytest.mark.parametrize("what", ["truncation", "padding"])
def test_no_text_is_cut_or_padded(what: str, directory: Path, tmp_path: Path) -> None:
    """A tokenizer.json may keep what it was saved with, as sentence-transformers' and many fine-tuned ones do."""
    shutil.copytree(directory, folder := tmp_path / "tokenizer")
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = saved.encode("the cat sat on the mat").ids
    saved.enable_truncation(2) if what == "truncation" else saved.enable_padding(length=64)
    saved.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert text_ids(tokenizer, None, "the cat sat on the mat") == whole
    assert Prompts(folder, tokenizer, 0).continued("the cat sat on the mat", Sampling()).prompt == whole


def test_stop_texts_that_spell_tokens_stand_for_them(prompts: Prompts, tokenizer: Tokenizer) -> None:
    sampling = Sampling(stop=("<|im_start|>", "b", "</tool_call>"), stop_tokens=(3,))
    names = ["<|im_start|>", "</tool_call>"]
    ids = tuple(tokenizer.token_to_id(name) for name in names)
    assert prompts.continued("a", sampling).sampling.stop_tokens == (3, *ids)
    end = tokenizer.token_to_id("<|im_end|>")
    assert prompts.answered(ASKED, sampling).sampling.stop_tokens == (3, end, *ids)


def test_a_conversation_is_rendered_and_ends_with_the_turn(prompts: Prompts, tokenizer: Tokenizer) -> None:
    request = prompts.answered(ASKED, Sampling())
    assert spelled(tokenizer, request.prompt) == (
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    )
    assert request.sampling.stop_tokens == (tokenizer.token_to_id("<|im_end|>"),)


def test_tools_calls_and_results_are_rendered(prompts: Prompts, tokenizer: Tokenizer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"what": "cat"}'}}
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "on the mat"},
    ]
    text = spelled(tokenizer, prompts.answered(turns, Sampling(), tools=[TOOL]).prompt)
    assert text.startswith("<|im_start|>system\nFunctions that you may call, as JSON schemas:\n<tools>\n")
    assert json.loads(text.partition("<tools>\n")[2].partition("\n</tools>")[0]) == TOOL
    assert '<tool_call>\n{"name": "find", "arguments": {"what": "cat"}}\n</tool_call><|im_end|>' in text
    assert text.endswith(
        "<|im_start|>tool\n<tool_response>\non the mat\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<tools>" not in spelled(tokenizer, prompts.answered(turns, Sampling()).prompt)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "a conversation has at least one message"),
        ([{"role": "boss", "content": "a"}], "message 1 has the role 'boss'"),
        (
            [*ASKED, {"role": "user", "content": "a<|im_end|>"}],
            "message 2 spells the control token <|im_end|>",
        ),
        ([{"role": "user", "content": "caf\udce9"}], r"message 1 is not UTF-8"),
    ],
)
def test_messages_that_cannot_be_asked_are_refused(
    prompts: Prompts, messages: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(Unusable, match=said):
        prompts.answered(messages, Sampling())


def test_what_is_no_text_is_refused(prompts: Prompts) -> None:
    with pytest.raises(Unusable, match=r"the prompt is not UTF-8 \(character 4\)"):
        prompts.continued("caf\udce9", Sampling())


def test_tools_that_the_template_does_not_take_are_refused(
    prompts: Prompts, directory: Path, tmp_path: Path
) -> None:
    plain = with_template(
        directory,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}",
        tmp_path / "plain",
    )
    assert plain.answered(ASKED, Sampling()).prompt
    with pytest.raises(Unusable, match="the model's chat template takes no tools; leave them out"):
        plain.answered(ASKED, Sampling(), tools=[TOOL])
    with pytest.raises(Unusable, match=r"the list of tools spells the control token <\|im_end\|>"):
        prompts.answered(ASKED, Sampling(), tools=[{**TOOL, "type": "<|im_end|>"}])


def test_templates_that_cannot_chat_are_named(directory: Path, tmp_path: Path) -> None:
    silent = with_template(directory, None, tmp_path / "none")
    assert silent.continued("a", Sampling()).prompt
    with pytest.raises(ConfigError, match=r"has no chat template; add chat_template\.jinja"):
        silent.answered(ASKED, Sampling())
    wrong = with_template(directory, "{{ raise_exception('no') }}", tmp_path / "wrong")
    with pytest.raises(
        ConfigError, match=r"the tokenizer in .*wrong cannot chat: the chat template refuses it"
    ):
        wrong.require_chat()
