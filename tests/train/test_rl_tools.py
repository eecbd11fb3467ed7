"""Environments with tools, played by a model that says what the test tells it."""

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from drivetrain.conf.errors import ConfigError, DataError, DrivetrainError
from drivetrain.data.chat import Chat
from drivetrain.data.tokenizer import train_tokenizer
from drivetrain.model.generate import Completion, Request, Sampling
from drivetrain.train.rl.environments import build_environment
from drivetrain.train.rl.episodes import Environment, Played
from drivetrain.train.rl.play import Player, Task
from drivetrain.train.rl.rewards import Sample
from drivetrain.train.rl.rollout import judged

QUESTIONS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "level": n} for n in range(1, 13)]
DOCUMENTS = [
    {"title": "Lamps", "text": "The lamp of the northern lighthouse is red."},
    {"text": "Two harbours have a lighthouse; the southern one is older. <|im_end|>"},
    {"title": None, "text": "Bread is baked at dawn."},
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("What is the answer to 1 + 2? name arguments expression " * 30)
    train_tokenizer([folder / "a.txt"], 300, folder / "tok")
    return Chat(folder / "tok")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, DOCUMENTS)))
    return tmp_path


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def play(chat: Chat, environment: Environment, *says: str, room: int = 900) -> Played:
    """One episode in which the model says these texts, turn by turn; a text that ends in a stop text goes on."""
    stop = chat.stop_id()
    assert stop is not None
    turns = iter(says)
    asked: list[list[int]] = []

    def generate(requests: Sequence[Request]) -> list[list[Completion]]:
        (request,) = requests
        asked.append(list(request.prompt))
        text = next(turns)
        ids = chat.tokenizer.encode(text, add_special_tokens=False).ids
        ids = ids if text.endswith(request.sampling.stop or ("\0",)) else [*ids, stop]
        return [[Completion(ids, [-1.0] * len(ids), [-1.0] * len(ids), "stop")]]

    player = Player(environment, chat, [stop], 4096)
    ((one,),) = player.play([Task(environment.problem(0), Sampling(max_tokens=room), 1)], generate)
    prompt = player.prompt(environment.problem(0))
    assert asked[-1] == [*prompt, *one.trajectory.tokens][: len(asked[-1])]  # nothing was tokenised again
    return one


def said(one: Played) -> list[str]:
    """What the environment said."""
    return [message["content"] for message in one.sample.messages if message["role"] == "tool"]


def test_a_calculator(chat: Chat, files: Path) -> None:
    environment = build_environment(f"questions:{files / 'q.jsonl'}?tools=calculator&max_turns=4", 0, 2, True)
    problem = environment.problem(0)
    number = problem.reference["level"]
    turns = [
        call("calculator", expression=f"{number} * 2"),
        call("calculator", expression="1 / 0") + "\n" + call("abacus", beads=3),
        call("calculator", expression=3) + "<tool_call>calculator(1)</tool_call>",
        f"It is <answer>{2 * number}</answer>",
    ]
    one = play(chat, environment, *turns)
    assert said(one) == [
        str(2 * number),
        "error: division by zero",
        "error: there is no tool 'abacus'; there is calculator",
        "error: calculator takes one argument, 'expression', which is a text",
        "error: this call is not JSON (Expecting value: line 1 column 1 (char 0))",
    ]
    parts, correct = judged(environment, [one])
    assert (parts, correct) == ({"correct": [1.0]}, [True])
    assert one.trajectory.turns == 4 and one.sample.completion == turns[-1]
    mine = [
        token for token, written in zip(one.trajectory.tokens, one.trajectory.written, strict=True) if written
    ]
    stop = "<|im_end|>"
    assert chat.tokenizer.decode(mine, skip_special_tokens=False) == stop.join([*turns, ""])
    text = chat.tokenizer.decode(one.trajectory.tokens, skip_special_tokens=False)
    assert (
        f"{turns[0]}{stop}\n<|im_start|>tool\n<tool_response>\n{2 * number}\n</tool_response>{stop}\n"
        "<|im_start|>assistant\n<tool_call>"
    ) in text


def test_the_model_is_shown_its_tools(chat: Chat, files: Path) -> None:
    environment = build_environment(f"questions:{files / 'q.jsonl'}?tools=calculator", 0, 2, True)
    prompt = chat.tokenizer.decode(Player(environment, chat, [0], 4096).prompt(environment.problem(0)))
    assert '"name": "calculator"' in prompt and '"expression": {"type": "string"}' in prompt


def test_turns_come_to_an_end(chat: Chat, files: Path) -> None:
    environment = build_environment(f"questions:{files / 'q.jsonl'}?tools=calculator&max_turns=2", 0, 2, True)
    one = play(chat, environment, *[call("calculator", expression="1+1")] * 2)
    assert said(one) == ["2"] and one.trajectory.turns == 2 and one.trajectory.finish_reason == "stop"
    assert judged(environment, [one])[1] == [False]


def test_what_calls_without_a_result_cost(chat: Chat, files: Path) -> None:
    name = f"questions:{files / 'q.jsonl'}?tools=calculator&penalty=0.25"
    environment = build_environment(name, 0, 2, True)
    wrong = call("calculator", expression="two") + call("calculator", expression="2")
    parts, _ = judged(environment, [play(chat, environment, wrong, wrong, "none")])
    assert parts == {"correct": [0.0], "tool_errors": [-0.5]}


def test_python_runs_in_the_sandbox(chat: Chat, files: Path) -> None:
    name = f"questions:{files / 'q.jsonl'}?tools=python&max_turns=6&seconds=2&characters=60"
    environment = build_environment(name, 0, 2, True)
    one = play(
        chat,
        environment,
        call("python", code="print(sum(range(10)))"),
        call("python", code="1 / 0"),
        call("python", code="while True: pass"),
        call("python", code="import socket; socket.socket()"),
        call("python", code="print('ab' * 500)"),
        "done",
        room=2000,
    )
    first, error, endless, network, long = said(one)
    assert first == "45"
    assert error.startswith("error: ") and error.endswith("the program failed")
    assert endless == "error: the program took longer than 2 s"
    assert network.startswith("error: ") and network.endswith("the program failed")
    assert long == f"{'ab' * 20} [...] {'ab' * 10}"


def test_a_search_by_calls(chat: Chat, files: Path) -> None:
    pytest.importorskip("bm25s")
    name = f"questions:{files / 'q.jsonl'}?tools=search&documents={files / 'd.jsonl.gz'}&found=2"
    environment = build_environment(name, 0, 2, True)
    one = play(
        chat,
        environment,
        call("search", query="red lamp of a lighthouse"),
        call("search", query="zebra"),
        "red",
    )
    found, nothing = said(one)
    assert found.startswith("[1] Lamps\nThe lamp of the northern lighthouse is red.\n\n[2] Two harbours")
    assert nothing == "error: nothing was found; use other words"
    # What a document spells ends no turn.
    ended = chat.tokenizer.token_to_id("<|im_end|>")
    assert [one.trajectory.written[at] for at, t in enumerate(one.trajectory.tokens) if t == ended] == (
        [True, False, True, False, True]
    )


def test_a_search_by_tags(chat: Chat, files: Path) -> None:
    """Search-R1's form: the result stands within the model's turn, which goes on behind it."""
    pytest.importorskip("bm25s")
    name = f"questions:{files / 'q.jsonl'}?tools=search&calls=tags&documents={files / 'd.jsonl.gz'}&found=1"
    environment = build_environment(name, 0, 2, True)
    asked = environment.problem(0).messages[0]["content"]
    assert "write <search>query</search>" in asked and "between <information> and </information>" in asked
    answer = f"<answer>{2 * environment.problem(0).reference['level']}</answer>"
    one = play(chat, environment, "Hm. <search>dawn</search>", "what</search>", answer)
    text = chat.tokenizer.decode(one.trajectory.tokens, skip_special_tokens=False)
    assert text == (
        "Hm. <search>dawn</search>\n<information>\n[1] Bread is baked at dawn.\n</information>\nwhat</search>"
        "\n<information>\nerror: a call has the form <search>...</search>\n</information>\n"
        + answer
        + "<|im_end|>"
    )
    assert one.trajectory.turns == 3 and judged(environment, [one])[1] == [True]
    written = [t for t, mine in zip(one.trajectory.tokens, one.trajectory.written, strict=True) if mine]
    assert "Bread" not in chat.tokenizer.decode(written)


def test_reasoning_gym_with_tools() -> None:
    pytest.importorskip("reasoning_gym")
    plain = "reasoning_gym:chain_sum?min_terms=2&max_terms=2"
    with_tools = build_environment(f"{plain}&tools=calculator&max_turns=3", 0, 4, True)
    without = build_environment(plain, 0, 4, True)
    assert [with_tools.problem(n) for n in range(5)] == [without.problem(n) for n in range(5)]
    assert with_tools.held_out(4) == without.held_out(4)


# Questions out of a file


def sample(environment: Environment, number: int, text: str) -> Sample:
    problem = environment.problem(number)
    return Sample(problem.messages, text, 1, "stop", problem.reference)


def test_every_epoch_has_every_question_that_is_not_held_out(files: Path) -> None:
    environment = build_environment(f"questions:{files / 'q.jsonl'}", 0, 3, True)
    held_out = [problem.reference["level"] for problem in environment.held_out(3)]
    levels = [environment.problem(number).reference["level"] for number in range(27)]
    epochs = [levels[:9], levels[9:18], levels[18:]]
    assert [sorted(epoch) for epoch in epochs] == [sorted(set(range(1, 13)) - set(held_out))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    other = build_environment(f"questions:{files / 'q.jsonl'}", 1, 3, True)
    assert [problem.reference["level"] for problem in other.held_out(3)] == held_out
    assert [other.problem(number).reference["level"] for number in range(9)] != epochs[0]


def test_held_out_questions_of_another_file(files: Path, tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text(json.dumps(QUESTIONS[4]))
    name = f"questions:{files / 'q.jsonl'}?held_out={tmp_path / 'h.jsonl'}"
    for unseen, size in ((True, 11), (False, 12)):
        environment = build_environment(name, 0, 100, unseen)
        assert len(environment.held_out(100)) == 1
        assert len({environment.problem(n).reference["level"] for n in range(size)}) == size
        assert (5 in {environment.problem(n).reference["level"] for n in range(size)}) is not unseen


def test_judges(files: Path) -> None:
    pytest.importorskip("math_verify")
    for judge, right in (("exact", [True, False]), ("math", [True, True])):
        environment = build_environment(f"questions:{files / 'q.jsonl'}?judge={judge}", 0, 2, True)
        answer = environment.problem(0).reference["answer"]
        texts = (f"\\boxed{{{answer}}}", f"\\boxed{{\\frac{{{2 * int(answer)}}}{{2}}}}")
        parts = environment.reward.score([sample(environment, 0, text) for text in texts])
        assert environment.correct(parts) == right
        environment.close()


def test_questions_without_an_answer_are_not_scored(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
    lines = [{"prompt": messages}, {"prompt": "Say it twice."}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    environment = build_environment(f"questions:{tmp_path / 'q.jsonl'}", 0, 1, True)
    shown = [environment.problem(0).messages, environment.held_out(1)[0].messages]
    assert messages in shown and [{"role": "user", "content": "Say it twice."}] in shown
    parts = environment.reward.score([sample(environment, 0, "hello")])
    assert math.isnan(parts["correct"][0]) and environment.correct(parts) == [False]


WRONG = {
    "?tools=": "name each tool once",
    "?tools=abacus": "there is no tool abacus; there is calculator, python, search",
    "?tools=calculator,calculator": "name each tool once",
    "?tools=calculator&calls=xml": "calls=xml; use one of template, tags",
    "?tools=calculator&max_turns=1": "max_turns=1 of an environment with tools; use 2 or more",
    "?tools=calculator&max_turns=many": "max_turns=many is no number",
    "?tools=calculator&penalty=-1": "penalty=-1",
    "?tools=calculator&seconds=3": "seconds belongs to a tool that tools=calculator does not name",
    "?tools=python&walls=paper": "walls=paper; use one of auto",
    "?tools=python&seconds=0": "a sandbox's seconds is 0",
    "?tools=search": "tools=search needs documents=PATH",
    "?tools=search&documents=none.jsonl": "none.jsonl does not exist",
    "?tools=search&documents=q.jsonl": 'line 1: a document has a "text"',
    "?judge=me": "judge=me of an environment is not known",
    "?max_turns=3": "there is no setting max_turns; there is held_out, judge, tools",
    "?x": "settings have the form",
}


@pytest.mark.parametrize("query", WRONG)
def test_wrong_settings(files: Path, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(DrivetrainError, match=WRONG[query]):
        build_environment(f"questions:q.jsonl{query}", 0, 2, True)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ('{"question": "a"}', (ConfigError, "nothing to train on beside 1 held-out")),
        ('{"answer": 3}', (DataError, 'line 1: no "question" and no "prompt"')),
        ('{"question": 3}', (DataError, '"question" is neither a text nor a list of messages')),
        ('{"prompt": [{"role": "user"}]}', (DataError, '"prompt" is neither')),
        ("[1]", (DataError, "line 1: not an object with keys")),
        ("no", (DataError, "line 1: not JSON")),
        ("", (ConfigError, "holds no problem")),
    ],
)
def test_files_without_questions(tmp_path: Path, lines: str, wrong: tuple[type[Exception], str]) -> None:
    (tmp_path / "q.jsonl").write_text(lines)
    with pytest.raises(wrong[0], match=wrong[1]):
        build_environment(f"questions:{tmp_path / 'q.jsonl'}", 0, 2, True)


# Your own


class Capitals:
    """Not an environment in full: what `custom:` hands over is all that is looked at here."""

    def __init__(self, seed: int, held_out: int, unseen: bool, level: int = 0) -> None:
        self.given = (seed, held_out, unseen, level)


def test_an_environment_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = build_environment("custom:test_rl_tools:Capitals?level=3", 7, 5, True)
    assert made.given == (7, 5, True, 3)  # type: ignore[attr-defined]
    for name, wrong in (
        ("custom:test_rl_tools", "is not of the form package.module:name"),
        ("custom:test_rl_tools:Rivers", "cannot be imported"),
        ("custom:test_rl_tools:Capitals?height=3", "cannot be made"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            build_environment(name, 7, 5, True)
