"""Calls of tools in the forms that chat templates write."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from drivetrain.conf.errors import ConfigError
from drivetrain.data.chat import Chat
from drivetrain.train.rl.calls import Call, CallForm

TEMPLATES = Path(__file__).parent.parent / "data" / "templates"
OURS = Path(__file__).parents[2] / "data" / "chat_template.jinja"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
ADD = Call("add", {"a": 1})
FORMS = {
    "ours": (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
        "<tool_call>",
        "</tool_call>",
    ),
    "thinking": (
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
        "<tool_call>",
        "</tool_call>",
    ),
    "llama3": ('{"name": "add", "parameters": {"a": 1}}', "", ""),
    "mistral": ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', "[TOOL_CALLS]", ""),
}


@pytest.fixture
def form_of(tmp_path: Path) -> Callable[[str], CallForm]:
    def make(source: str) -> CallForm:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        (tmp_path / "chat_template.jinja").write_text(source)
        return CallForm(Chat(tmp_path), TOOLS)

    return make


def template(name: str) -> str:
    return (OURS if name == "ours" else TEMPLATES / f"{name}.jinja").read_text()


@pytest.mark.parametrize("name", FORMS)
def test_a_call_is_read_as_the_template_writes_it(form_of: Callable[[str], CallForm], name: str) -> None:
    form, (written, opening, closing) = form_of(template(name)), FORMS[name]
    assert (form.open, form.close) == (opening, closing)
    assert form.read(written) == (ADD,)
    assert form.read("It is 3") == () == form.read("")
    thought = f"<think>I may write {written}, or not</think>"
    assert form.read(f"{thought}It is 3") == () and form.read(f"{thought}\n{written}") == (ADD,)
    assert form.read(f"<think>{written}") == ()
    assert form.beside("It is 3") == "It is 3"
    assert form.beside(f"{thought}\n{written}") == thought


def test_several_calls(form_of: Callable[[str], CallForm]) -> None:
    one = FORMS["ours"][0]
    assert form_of(template("ours")).read(f"First\n{one}\n{one}") == (ADD, ADD)
    listed = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "sub"}]'
    assert form_of(template("mistral")).read(listed) == (ADD, Call("sub"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("ours", "<tool_call>add(1)</tool_call>", "this call is not JSON"),
        ("ours", '<tool_call>{"name": "add", "arguments": {"a": 1}', "this call is not JSON"),
        ("ours", "<tool_call>" + "[" * 100_000 + "</tool_call>", "this call is not JSON"),
        ("ours", '<tool_call>["add"]</tool_call>', 'a call has the form {"name": NAME, "arguments": OBJECT}'),
        ("ours", '<tool_call>{"name": "add", "arguments": "1"}</tool_call>', "a call has the form"),
        ("ours", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', "a call has the form"),
        ("llama3", '{"name": "add", "parameters": {"a": 1}', "this call is not JSON"),
        ("mistral", "[TOOL_CALLS] add", "this call is not JSON"),
    ],
)
def test_what_is_no_call_says_so(form_of: Callable[[str], CallForm], name: str, text: str, said: str) -> None:
    (call,) = form_of(template(name)).read(text)
    assert call.error.startswith(said)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (template("chatml"), "takes no calls of tools"),
        (
            "{{ messages[1].content }}{% if messages[1].tool_calls %}{{ nothing.at.all }}{% endif %}",
            "takes no",
        ),
        (
            "{{ messages[1].content }}{% for c in messages[1].tool_calls or [] %}"
            "<function={{ c.function.name }}>{% endfor %}<|im_end|>",
            "in a form that is not known",
        ),
    ],
)
def test_templates_without_such_a_form(form_of: Callable[[str], CallForm], source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}.*calls=tags"):
        form_of(source)
