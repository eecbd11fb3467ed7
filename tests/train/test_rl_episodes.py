"""Episodes of several turns: what the model wrote stays as it was sampled, token by token."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from drivetrain.conf.errors import ConfigError
from drivetrain.data.chat import Chat
from drivetrain.model.generate import Completion, Request, Sampling
from drivetrain.train.rl.episodes import Defaults, EpisodeError, Played, Problem, Step, Turn
from drivetrain.train.rl.guard import GuardedEnvironment
from drivetrain.train.rl.play import Player, Task
from drivetrain.train.rl.rewards import Sample
from drivetrain.train.rl.turns import Turns

TEMPLATES = Path(__file__).parent.parent / "data" / "templates"
SPECIAL = {
    "chatml": ["<|im_end|>", "<|im_start|>"],
    "thinking": ["<|im_end|>", "<|im_start|>"],
    "llama3": ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    "mistral": ["</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
}
TEXT = 'Hello there, what is 1 + 2? It is 3, 日本語\n\n{"name": "add"} user assistant tool ' * 3


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
    folder = tmp_path_factory.mktemp("chats")

    def make(template: str, words: Callable[[], Tokenizer] = byte_level, source: str | None = None) -> Chat:
        directory = folder / f"{template}_{words.__name__}"
        if not directory.exists():
            tokenizer = words()
            special = SPECIAL.get(template, SPECIAL["chatml"])
            tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
            directory.mkdir()
            tokenizer.save(str(directory / "tokenizer.json"))
            names = {"bos_token": special[1], "eos_token": special[0]}
            (directory / "tokenizer_config.json").write_text(json.dumps(names))
            if source is None:
                shutil.copy(TEMPLATES / f"{template}.jinja", directory / "chat_template.jinja")
            else:
                (directory / "chat_template.jinja").write_text(source)
        return Chat(directory)

    return make


class Length:
    """Rewards the last turn's length, in characters."""

    def score(self, samples: Sequence[Sample]) -> Mapping[str, list[float]]:
        return {"length": [float(len(sample.completion)) for sample in samples]}


class Scripted(Defaults):
    """Answers the model's turns with the observations in turn, and is over after the last one's answer."""

    parts = ("turns",)
    workers = 2

    def __init__(self, observations: list[Any], stop: tuple[str, ...] = ()) -> None:
        self.reward, self.observations, self.stop = Length(), observations, stop
        self.heard: list[list[Turn]] = []
        self.ended = 0

    def problem(self, number: int) -> Problem:
        return Problem([{"role": "user", "content": f"what is {number}?"}], {"number": number})

    def held_out(self, count: int) -> list[Problem]:
        return [self.problem(number) for number in range(count)]

    def correct(self, parts: Mapping[str, Sequence[float]]) -> list[bool]:
        return [mark > 3 for mark in parts["length"]]

    def reset(self, problem: Problem, seed: int) -> "_Episode":
        self.heard.append([])
        return _Episode(self, self.heard[-1])


class _Episode:
    def __init__(self, of: Scripted, heard: list[Turn]) -> None:
        self.of, self.heard = of, heard

    def step(self, turn: Turn) -> Step:
        self.heard.append(turn)
        if len(self.heard) > len(self.of.observations):
            return Step(done=True)
        observation = self.of.observations[len(self.heard) - 1]
        if isinstance(observation, Exception):
            raise observation
        return Step(observation, {"turns": 1.0})

    def end(self) -> dict[str, float]:
        self.of.ended += 1
        return {"turns": 0.25}


class Script:
    """A sampler that writes what it is told: for turn t of any episode the tokens of `says[t]`."""

    def __init__(self, says: list[list[int]]) -> None:
        self.says, self.calls = says, []
        self.turn = 0

    def __call__(self, requests: Sequence[Request]) -> list[list[Completion]]:
        self.calls.append(list(requests))
        given = []
        for request in requests:
            tokens = self.says[len(self.calls) - 1][: request.sampling.max_tokens]
            whole = len(tokens) == len(self.says[len(self.calls) - 1])
            logprobs = [-0.1 * (place + 1) - len(self.calls) for place in range(len(tokens))]
            one = Completion(tokens, logprobs, logprobs, "stop" if whole else "length")
            given.append([one] * request.samples)
        return given


def unlikely(chat: Chat, text: str, end: str) -> list[int]:
    """Tokens of a text that the tokenizer itself would write otherwise: letter by letter."""
    letters = [chat.tokenizer.encode(end + letter, add_special_tokens=False).ids[1:] for letter in text]
    ids = [*(one for letter in letters for one in letter), chat.tokenizer.token_to_id(end)]
    assert len(ids) > len(chat.tokenizer.encode(text + end, add_special_tokens=False).ids)
    return ids


def played(
    chat: Chat, environment: Scripted, script: Callable[..., Any], end: str, room: int = 200, G: int = 2
) -> list[list[Played]]:
    eos = chat.tokenizer.token_to_id(end)
    player = Player(environment, chat, [eos], 400)
    tasks = [Task(environment.problem(number), Sampling(max_tokens=room, seed=5), G) for number in range(2)]
    return player.play(tasks, script)


TOOL = [{"role": "tool", "content": " It is <|im_end|>3 ", "name": "add"}]
USER = [{"role": "user", "content": "what?"}]
BEHIND = {
    ("chatml", "tool"): "\n<|im_start|>tool\n It is < |im_end|>3 <|im_end|>\n<|im_start|>assistant\n",
    ("chatml", "user"): "\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n",
    ("thinking", "user"): "\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n",
    ("llama3", "tool"): "<|start_header_id|>ipython<|end_header_id|>\n\nIt is <|im_end|>3<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ("llama3", "user"): "<|start_header_id|>user<|end_header_id|>\n\nwhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    (
        "mistral",
        "tool",
    ): '[TOOL_RESULTS] {"content": " It is <|im_end|>3 ", "call_id": "call00000"}[/TOOL_RESULTS]',
    ("mistral", "user"): "[INST] what? [/INST]",
}


@pytest.mark.parametrize("words", [byte_level, sentencepiece])
@pytest.mark.parametrize(("template", "kind"), BEHIND)
def test_the_next_prompt_is_the_tokens_so_far_and_the_observation(
    chat_of: Callable[..., Chat], template: str, kind: str, words: Callable[[], Tokenizer]
) -> None:
    chat, end = chat_of(template, words), SPECIAL[template][0]
    says = [unlikely(chat, text, end) for text in ("  <think>add</think> 3 ", "Hello there", "It is 3")]
    rounds = TOOL if kind == "tool" else USER
    environment, script = Scripted([rounds, rounds]), Script(says)
    groups = played(chat, environment, script, end)
    prompt = chat.prompt(environment.problem(1).messages)
    first, second = (
        chat.tokenizer.encode(
            end + BEHIND[template, kind].replace("call00000", call), add_special_tokens=False
        ).ids[1:]
        for call in ("call00000", "call00001")
    )
    expected = [*says[0], *first, *says[1], *second, *says[2]]
    one = groups[1][0].trajectory
    assert one.tokens == expected and one.turns == 3 and one.finish_reason == "stop"
    # A turn's prompt is the prompt before it, what the model wrote and the observation, nothing else.
    assert [len(call) for call in script.calls] == [2, 4, 4]
    assert [request.samples for call in script.calls for request in call] == [2, 2, *[1] * 8]
    asked = [list(call[-1].prompt) for call in script.calls]
    assert asked == [prompt, [*prompt, *says[0], *first], [*prompt, *says[0], *first, *says[1], *second]]
    wrote = [token for token, mine in zip(one.tokens, one.written, strict=True) if mine]
    assert wrote == [token for said in says for token in said]
    assert one.length == len(wrote) == len(one.logprobs)
    assert one.behaviour_logprobs[len(says[0])] == pytest.approx(-2.1)  # the second turn's first
    if words is byte_level:
        assert chat.tokenizer.decode(one.tokens, skip_special_tokens=False).count("<think>add</think>") == 1


def test_draws_of_later_turns_are_their_own(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of("chatml")
    script = Script([unlikely(chat, "Hello", "<|im_end|>")] * 3)
    played(chat, Scripted([USER, USER]), script, "<|im_end|>")
    seeds = [request.sampling.seed for call in script.calls[1:] for request in call]
    assert script.calls[0][0].sampling.seed == 5
    first, second = seeds[:4], seeds[4:]  # both problems have the sampling seed 5 here
    assert first[:2] == first[2:] and len({*first, *second}) == 4 and 5 not in seeds
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_what_is_judged(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of("chatml")
    environment = Scripted([TOOL])
    says = [unlikely(chat, text, "<|im_end|>") for text in ("Hello", "It is 3")]
    one = played(chat, environment, Script(says), "<|im_end|>")[0][0]
    assert one.sample == Sample(
        messages=[
            {"role": "user", "content": "what is 0?"},
            {"role": "assistant", "content": "Hello"},
            *TOOL,
        ],
        completion="It is 3",
        tokens=len(says[0]) + len(says[1]),
        finish_reason="stop",
        reference={"number": 0},
        turns=2,
    )
    assert one.rewards == {"turns": 1.25} and environment.ended == 4
    assert environment.heard[0] == [Turn(text, False, (), text) for text in ("Hello", "It is 3")]


def test_an_episode_that_outgrows_its_room_is_cut(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of("chatml")
    says = [unlikely(chat, "Hello user", "<|im_end|>")] * 3  # 11 tokens each
    environment = Scripted([USER, USER])
    one = played(chat, environment, Script(says), "<|im_end|>", room=13)[0][0].trajectory
    assert one.length == 13 and one.turns == 2 and one.finish_reason == "length"
    assert environment.heard[0][-1].cut
    one = played(chat, Scripted([USER, USER]), Script(says), "<|im_end|>", room=11)[0][0].trajectory
    assert one.length == len(one.tokens) == 11 and one.turns == 1 and one.finish_reason == "length"
    # An observation without an end to it: the trajectory ends with what the model wrote.
    long = [{"role": "user", "content": "what is it? " * 100}]
    one = played(chat, Scripted([long]), Script(says), "<|im_end|>")[0][0].trajectory
    assert one.tokens == says[0] and one.finish_reason == "length"


def test_a_prompt_without_room_is_refused(chat_of: Callable[..., Chat]) -> None:
    with pytest.raises(
        ConfigError, match=r"stage\.seq_len=400 with stage\.max_completion=395 leaves room for 5"
    ):
        played(chat_of("chatml"), Scripted([]), Script([]), "<|im_end|>", room=395)


def test_what_fails_is_dropped_and_said_once(
    chat_of: Callable[..., Chat], capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_of("chatml")
    environment = Scripted([USER, EpisodeError("the server is gone")])
    groups = played(chat, environment, Script([unlikely(chat, "Hello", "<|im_end|>")] * 3), "<|im_end|>")
    for one in [one for group in groups for one in group]:
        assert one.trajectory.finish_reason == one.sample.finish_reason == "failed"
        assert one.trajectory.tokens == [] and one.trajectory.length == 0
    assert environment.ended == 4
    assert capsys.readouterr().err == "warning: an episode is left out: the server is gone\n"
    lost: Callable[..., Any] = lambda requests: [[None] * request.samples for request in requests]  # noqa: E731
    assert played(chat, environment, lost, "<|im_end|>")[0][0].trajectory.finish_reason == "failed"


class Hanging(Scripted):
    """Episodes of the first problem hang: in what they are begun with, in their step, or in their end."""

    def __init__(self, where: str) -> None:
        super().__init__([USER])
        self.where = where

    def reset(self, problem: Problem, seed: int) -> Any:
        first = problem.reference["number"] == 0
        if first and self.where == "reset":
            threading.Event().wait()
        episode: Any = super().reset(problem, seed)
        if first and self.where != "reset":
            setattr(episode, self.where, lambda *_: threading.Event().wait())
        return episode


@pytest.mark.parametrize("where", ["reset", "step", "end"])
def test_however_many_hang_a_round_takes_one_deadline(chat_of: Callable[..., Chat], where: str) -> None:
    chat = chat_of("chatml")
    says = [unlikely(chat, "Hello", "<|im_end|>")] * 2
    environment = GuardedEnvironment(Hanging(where), 1.0)
    player = Player(environment, chat, [chat.tokenizer.token_to_id("<|im_end|>")], 400, 1.0)
    tasks = [
        Task(environment.problem(number), Sampling(max_tokens=100, seed=5), many)
        for number, many in ((0, 6), (1, 2))
    ]
    began = time.monotonic()
    hung, whole = player.play(tasks, Script(says))
    assert time.monotonic() - began < 2.5
    assert [one.trajectory.finish_reason for one in hung] == ["failed"] * 6
    assert [one.trajectory.turns for one in whole] == [2, 2]
    assert [one.rewards for one in whole] == [{"turns": 1.25}] * 2


def test_text_within_the_models_turn(chat_of: Callable[..., Chat]) -> None:
    """As with search tokens: the environment's text follows at once, and the turn goes on."""
    for words in (byte_level, sentencepiece):
        chat = chat_of("chatml", words)
        says = [unlikely(chat, "Hello</search>", "<|im_end|>")[:-1], unlikely(chat, "It is 3", "<|im_end|>")]
        script = Script(says)
        one = played(chat, Scripted(["\nHello there\n"], stop=("</search>",)), script, "<|im_end|>")[0][0]
        middle = chat.tokenizer.encode("<|im_end|>\nHello there\n", add_special_tokens=False).ids[1:]
        assert one.trajectory.tokens == [*says[0], *middle, *says[1]]
        assert script.calls[0][0].sampling.stop == ("</search>",)
        assert one.sample.messages[-1] == {"role": "tool", "content": "\nHello there\n"}


def test_a_turn_that_ends_otherwise_is_ended_for_the_model(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of("chatml")
    says = [[5, 6], [7]]  # a stop text, or an end token that the template does not use
    one = played(chat, Scripted([USER]), Script(says), "<|im_end|>")[0][0].trajectory
    text = "<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    assert one.tokens == [5, 6, *chat.tokenizer.encode(text, add_special_tokens=False).ids, 7]
    assert one.written == [True] * 2 + [False] * (len(one.tokens) - 3) + [True]


def test_ranks_make_as_many_calls(chat_of: Callable[..., Chat]) -> None:
    """A rank with nothing to play takes part in every call of the others."""
    chat = chat_of("chatml")
    player = Player(Scripted([USER]), chat, [0], 400)
    others = iter([True, True, False])
    calls: list[int] = []

    def generate(requests: Sequence[Request]) -> list[list[Completion]]:
        calls.append(len(requests))
        return []

    assert player.play([], generate, lambda here: next(others)) == []
    assert calls == [0, 0]


def test_templates_that_cannot_show_it(chat_of: Callable[..., Chat]) -> None:
    plain = "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    chat = chat_of("no_tools", source=plain)
    first = [{"role": "user", "content": "what?"}]
    with pytest.raises(ConfigError, match="leaves messages of the role 'tool' out"):
        Turns(chat, None).after([TOOL], first, 0)
    schema = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    with pytest.raises(ConfigError, match=re.escape("does not show the model its tools (add)")):
        Turns(chat, schema)
    strict = plain.replace(
        "{% for", "{% if messages[-1].role == 'tool' %}{{ nothing.at.all }}{% endif %}{% for"
    )
    with pytest.raises(ConfigError, match="has no turn of the role 'tool' after the assistant's"):
        Turns(chat_of("strict", source=strict), None).after([TOOL], first, 0)


def test_a_reward_that_was_not_announced(chat_of: Callable[..., Chat]) -> None:
    environment = Scripted([])
    environment.parts = ()
    chat = chat_of("chatml")
    with pytest.raises(ConfigError, match="rewards 'turns', which is not in its `parts`"):
        played(chat, environment, Script([unlikely(chat, "Hello", "<|im_end|>")]), "<|im_end|>")
