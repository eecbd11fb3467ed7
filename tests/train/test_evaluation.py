"""Scores, tasks and the loss on shards, beside transformers and the training loop's own evaluation."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.conf.errors import ConfigError, DataError
from drivetrain.data.build import build
from drivetrain.model.generate import Request, Sampling
from drivetrain.train.evaluation.items import item_of, read_items
from drivetrain.train.evaluation.loss import Shards, check_tokenizer, held_out_loss, perplexity
from drivetrain.train.evaluation.memorisation import Probe, draw_documents, memorisation
from drivetrain.train.evaluation.score import Pair, Score, Scorer, Texts
from drivetrain.train.evaluation.tasks import (
    TaskOptions,
    answer_of,
    load_task,
    matches,
    mean_and_error,
    run_task,
)
from drivetrain.train.serve import OpenModel, Sampler, open_model

VOCAB, CONTEXT = 272, 96


@pytest.fixture(scope="module", params=["llama", "window"])
def opened(request: pytest.FixtureRequest, tiny_hf: Callable[..., Path]) -> OpenModel:
    return open_model(tiny_hf(window=7 if request.param == "window" else None))


@pytest.fixture(scope="module")
def sampler(tiny_hf: Callable[..., Path]) -> Sampler:
    return Sampler(tiny_hf(window=None))


# --- scores -------------------------------------------------------------------------------------------------


def theirs(folder: Path, pair: Pair) -> tuple[float, list[bool]]:
    """transformers' log-likelihood of a continuation, and which of its tokens are the likeliest."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens_T = torch.tensor([*pair.context, *pair.continuation])
    n = len(pair.continuation)
    with torch.no_grad():
        logprobs_TV = model(tokens_T[None]).logits[0].log_softmax(-1)[-n - 1 : -1]
    targets_T = tokens_T[-n:]
    greedy = (logprobs_TV.argmax(-1) == targets_T).tolist()
    return float(logprobs_TV.gather(1, targets_T[:, None]).sum()), greedy


def test_scores_are_those_of_transformers(opened: OpenModel) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        Pair(tuple(rng.integers(0, VOCAB, a).tolist()), tuple(rng.integers(0, VOCAB, b).tolist()))
        for a, b in [(1, 1), (5, 3), (30, 12), (80, 16), (2, 60)]
    ]
    folder = opened.tokenizer_dir
    for pair, score in zip(pairs, Scorer(opened).score(pairs), strict=True):
        logprob, greedy = theirs(folder, pair)
        assert abs(score.logprob - logprob) < 1e-4
        assert score.tokens == len(pair.continuation) and score.greedy == all(greedy)
        assert score.leading == next((i for i, same in enumerate(greedy) if not same), len(greedy))


tokens = st.integers(0, 5)  # few, so that inputs are equal and begin with each other
pair_lists = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=12), st.lists(tokens, min_size=1, max_size=6)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25)
@given(texts=pair_lists, batch_tokens=st.integers(1, 60))
def test_packing_changes_no_score(opened: OpenModel, texts: list[Any], batch_tokens: int) -> None:
    pairs = [Pair(tuple(context), tuple(continuation)) for context, continuation in texts]
    together = Scorer(opened, batch_tokens).score(pairs)
    scorer = Scorer(opened)
    for pair, score in zip(pairs, together, strict=True):
        (alone,) = scorer.score([pair])
        assert abs(score.logprob - alone.logprob) < 1e-4
        assert (score.leading, score.tokens, score.cut) == (alone.leading, alone.tokens, alone.cut)


def test_choices_of_one_token_take_one_pass(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    forward = type(opened.model).forward

    def counted(model: Any, tokens_T: torch.Tensor, *rest: Any) -> Any:
        passed.append(len(tokens_T))
        return forward(model, tokens_T, *rest)

    monkeypatch.setattr(type(opened.model), "forward", counted)
    question = tuple(range(10, 40))
    Scorer(opened).score([Pair(question, (token,)) for token in range(4)] + [Pair(question, (4, 5))])
    assert passed == [31]


def test_a_context_that_is_too_long_loses_its_beginning(opened: OpenModel) -> None:
    long = tuple(np.random.default_rng(1).integers(0, VOCAB, CONTEXT + 20).tolist())
    cut, short = Scorer(opened).score([Pair(long, (3, 4)), Pair(long[21:], (3, 4))])
    assert cut.cut == 21 and short.cut == 0
    assert abs(cut.logprob - short.logprob) < 1e-5
    assert Scorer(opened).score([Pair(long[20:], (3,))])[0].cut == 0  # the last input fills the context


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (Pair((), (1,)), "at least one token"),
        (Pair((1,), ()), "at least one token"),
        (Pair((1,), (VOCAB,)), "tokens lie in"),
        (Pair((1,), (1,) * (CONTEXT + 1)), "longer than the model's max_seq_len"),
    ],
)
def test_a_pair_that_cannot_be_scored_is_refused(sampler: Sampler, pair: Pair, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Scorer(sampler.opened).score([pair])


def test_white_space_belongs_to_the_continuation(opened: OpenModel) -> None:
    texts, made = Texts(opened), opened.tokenizer
    with_space, without = (
        texts.pair(text, choice) for text, choice in [("the cat ", "sat"), ("the cat", " sat")]
    )
    assert with_space == without
    assert made.decode(list(without.context)) == "the cat"
    assert texts.pair("", "a") == Pair((opened.eos_ids[0],), tuple(made.encode("a").ids))


# --- tasks --------------------------------------------------------------------------------------------------


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def planted(sampler: Sampler, folder: Path, chat: bool = False) -> Path:
    """Questions whose right choice is what the model itself says, and whose wrong one it would never say."""
    opened = sampler.opened
    scorer, texts = Scorer(opened), Texts(opened)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    records = []
    for word in ("cat", "mat", "the", "on"):
        pairs = [texts.pair(f"Question: {word}\nAnswer:", f" {letter}") for letter in letters]
        order = sorted(range(26), key=lambda i: -scorer.score([pairs[i]])[0].logprob)
        best, worst = letters[order[0]], letters[order[-1]]
        records.append({"question": word, "choices": [worst, best], "answer": best})
    return write_lines(folder / "planted.jsonl", records)


def test_accuracy_on_a_planted_task_is_1(sampler: Sampler, tmp_path: Path) -> None:
    options = TaskOptions()
    task = load_task(str(planted(sampler, tmp_path)), options)
    done: list[tuple[int, int]] = []
    found, rows = run_task(sampler, task, options, lambda more, total: done.append((more, total)))
    assert found["metrics"]["accuracy"] == {"value": 1, "stderr": 0}
    assert (found["kind"], found["questions"], found["chance"]) == ("multiple_choice", 4, 0.5)
    assert [row["chosen"] for row in rows] == [1] * 4 and rows[0]["where"].endswith("planted.jsonl, line 1")
    assert sum(more for more, _ in done) == 8 and {total for _, total in done} == {8}


def test_length_normalisation_divides_by_characters(sampler: Sampler, tmp_path: Path) -> None:
    record = {"context": "the cat", "choices": ["a", "sat on the mat; the cat sat"], "answer": 1}
    options = TaskOptions()
    _, (row,) = run_task(
        sampler, load_task(str(write_lines(tmp_path / "t.jsonl", [record])), options), options
    )
    one, other = row["logprobs"]
    assert row["chosen"] == int(other > one)
    assert row["chosen_norm"] == int(other / len(record["choices"][1]) > one)
    pair = Texts(sampler.opened).pair("the cat", " a")
    assert one == pytest.approx(Scorer(sampler.opened).score([pair])[0].logprob, abs=1e-5)


def continuation(sampler: Sampler, prompt: list[int], most: int) -> str:
    (found,) = sampler.complete(Request(prompt, Sampling(max_tokens=most, temperature=0)))
    text: str = found["text"]
    return text


@pytest.mark.parametrize("chat", [False, True])
def test_free_answers_are_generated_and_compared(chat: bool, sampler: Sampler, tmp_path: Path) -> None:
    from drivetrain.data.chat import Chat

    prompts = ["the cat sat", "on the mat"]
    template = Chat(sampler.opened.tokenizer_dir)
    tokens = [
        template.prompt([{"role": "user", "content": prompt}])
        if chat
        else sampler.tokenizer.encode(prompt).ids
        for prompt in prompts
    ]
    said = [continuation(sampler, each, 5) for each in tokens]
    records = [
        {"prompt": prompts[0], "answer": ["never", said[0].upper() + " "]},
        {"prompt": prompts[1], "answer": 12},
    ]
    options = TaskOptions(max_tokens=5, chat=chat, stop=())
    task = load_task(str(write_lines(tmp_path / "t.jsonl", records)), options)
    found, rows = run_task(sampler, task, options)
    assert [row["completion"] for row in rows] == said
    assert [row["mark"] for row in rows] == [1, 0] and found["chat"] is chat
    assert found["metrics"]["exact_match"] == {"value": 0.5, "stderr": pytest.approx(0.5)}
    assert found["unfinished"] == sum(row["finish_reason"] == "length" for row in rows)


def test_messages_are_asked_by_template(sampler: Sampler, tmp_path: Path) -> None:
    from drivetrain.data.chat import Chat

    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "the mat"}]
    options = TaskOptions(max_tokens=4, shots=1)
    records = [
        {"messages": messages, "answer": "x"},
        {"messages": [{"role": "user", "content": "cat"}], "answer": "y"},
    ]
    found, rows = run_task(
        sampler, load_task(str(write_lines(tmp_path / "t.jsonl", records)), options), options
    )
    shot = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "y"}]
    prompt = Chat(sampler.opened.tokenizer_dir).prompt([messages[0], *shot, messages[1]])
    assert rows[0]["cut"] == max(0, len(prompt) - (CONTEXT - 4))
    assert rows[0]["completion"] == continuation(sampler, prompt[rows[0]["cut"] :], 4)
    assert found["chat"] is True and found["shots"] == 1


def test_shots_are_others_and_repeat_with_the_seed(sampler: Sampler, tmp_path: Path) -> None:
    from drivetrain.train.evaluation.tasks import _Asker

    records = [{"prompt": f"q{i}:", "answer": f"a{i}"} for i in range(6)]
    path = write_lines(tmp_path / "t.jsonl", records)

    def asked(**changes: Any) -> list[str]:
        options = TaskOptions(**{"shots": 3, **changes})
        task = load_task(str(path), options)
        asker = _Asker(sampler.opened, task, options)
        return [asker.text(number, item) for number, item in enumerate(task.items)]

    texts = asked()
    for number, text in enumerate(texts):
        *shots, own = text.split("\n\n")
        assert own == f"q{number}:" and len(set(shots)) == 3
        assert (
            all(re.fullmatch(r"q(\d): a\1", shot) for shot in shots) and f"q{number}: a{number}" not in shots
        )
    assert asked() == texts and asked(seed=1) != texts
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": "p", "answer": "b"}])
    assert asked(shots=1, shots_from=other)[2] == "p b\n\nq2:"
    with pytest.raises(ConfigError, match="more than the 5 other questions"):
        asked(shots=6)


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 42\n", None, "42"),
        ("<think>7? 8!</think>\n9", None, "9"),
        ("so #### 1,234 and #### 56", r"#### ([\d,]+)", "56"),
        ("it is 3 or 4", r"\d", "4"),
        ("none", r"\d", ""),
    ],
)
def test_the_answer_is_extracted(text: str, pattern: str | None, answer: str) -> None:
    assert answer_of(text, re.compile(pattern) if pattern else None) == answer


@pytest.mark.parametrize(
    ("answer", "accepted", "same"),
    [
        ("Paris.", ["paris"], True),
        ("1,234,567", ["1234567"], True),
        ("1,23", ["123"], False),
        ("-4", ["4"], False),
        ("New  York", ["new york"], True),
        ("ｆｕｌｌ", ["full"], True),
        ("...", ["..."], True),
        ("", ["a"], False),
        ("b", ["a", "b"], True),
    ],
)
def test_comparison_leaves_form_out(answer: str, accepted: list[str], same: bool) -> None:
    assert matches(answer, accepted) is same


def test_the_standard_error_is_of_the_mean() -> None:
    values = [1.0, 0.0, 1.0, 1.0]
    found = mean_and_error(values)
    assert found["value"] == 0.75 and found["stderr"] == pytest.approx(np.std(values, ddof=1) / 2)
    assert mean_and_error([1.0]) == {"value": 1, "stderr": 0}


BROKEN = {
    "not an object": [1],
    "no question": {"answer": "a"},
    "question and prompt": {"question": "a", "prompt": "b", "answer": "a"},
    "no answer": {"prompt": "a"},
    "prompt must be a text": {"prompt": 1, "answer": "a"},
    "choices must be": {"question": "a", "choices": ["b"], "answer": 0},
    "no index of 2 choices": {"question": "a", "choices": ["b", "c"], "answer": 2},
    "is not one of the choices": {"question": "a", "choices": ["b", "b"], "answer": "b"},
    "answer must be": {"prompt": "a", "answer": None},
    "no known role": {"messages": [{"role": "x", "content": "a"}], "answer": "a"},
    "nothing to answer": {"messages": [{"role": "assistant", "content": "a"}], "answer": "a"},
    "a task is all multiple choice or all free": {"prompt": "a", "choices": ["b", "c"], "answer": 0},
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_line_is_named(said: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [{"prompt": "a", "answer": "b"}, BROKEN[said]])
    with pytest.raises(DataError, match=f"{re.escape(str(path))}, line 2: .*{said}"):
        read_items(path)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt"\n')
    with pytest.raises(DataError, match="line 3: not JSON"):
        read_items(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no question"):
        read_items(path)
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(ConfigError, match="is a text file and no task"):
        read_items(tmp_path / "t.txt")


def test_parquet_is_read_too(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"question": "a", "choices": ["b", "c"], "answer": "c"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "t.parquet")
    (item,) = read_items(tmp_path / "t.parquet")
    assert (item.right, item.choices, item.bare) == (1, ("b", "c"), "Question: a\nAnswer:")
    assert item_of({"context": "a", "choices": ["b", "c"], "answer": 0}).bare == "a"


def test_reasoning_gym_makes_and_marks_tasks(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    name = "reasoning_gym:basic_arithmetic?size=3&seed=5&max_terms=2"
    options = TaskOptions(max_tokens=4)
    first, again, other = (
        load_task(each, options) for each in (name, name, name.replace("seed=5", "seed=6"))
    )
    questions = [[item.question for item in task.items] for task in (first, again, other)]
    assert questions[0] == questions[1] != questions[2] and len(questions[0]) == 3
    item = first.items[0]
    assert item.judge is not None
    assert item.judge(item.answers[0]) == item.judge(f"well, <answer> {item.answers[0]} </answer>") == 1
    assert item.judge("nonsense") < 1
    found, rows = run_task(sampler, first, options)
    assert set(found["metrics"]) == {"exact_match", "mark"} and len(rows) == 3
    for wrong in ("reasoning_gym:nothing", "reasoning_gym:basic_arithmetic?sizes=3"):
        with pytest.raises(ConfigError, match="cannot be made"):
            load_task(wrong, options)


# --- loss and memorisation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "mat", "dog", "ran"]
    texts = [" ".join(rng.choice(words, int(rng.integers(3, 40)))) for _ in range(160)]
    write_lines(folder / "a.jsonl", [{"text": text} for text in texts])
    build([folder / "a.jsonl"], tiny_tokenizer, folder / "out", workers=1, held_out=0.3)
    return folder / "out"


def test_the_loss_is_a_plain_mean_over_the_windows(sampler: Sampler, shards: Path) -> None:
    """All windows once: against one document at a time, through the scorer."""
    opened = sampler.opened
    found = held_out_loss(opened, Shards({"data": shards}, 24, 10**6, 0))
    from drivetrain.data.windows import Windows

    windows = Windows(shards, "held_out", 24)
    eos = windows.manifest.eos_id
    pairs = []
    for window in windows.read(np.arange(len(windows))).tolist():
        begins = [0, *(i + 1 for i, token in enumerate(window[:-1]) if token == eos)]
        for begin, end in zip(begins, [*begins[1:], 25], strict=True):
            part = window[begin:end]
            if len(part) > 1:
                pairs.append(Pair((part[0],), tuple(part[1:])))
    scores: list[Score] = Scorer(opened).score(pairs)
    tokens = sum(score.tokens for score in scores)
    assert found["tokens"] == tokens
    loss = -sum(score.logprob for score in scores) / tokens
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    lengths = [
        len(opened.tokenizer.decode([token])) for pair in pairs for token in pair.continuation if token != eos
    ]
    assert found["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / sum(lengths), rel=1e-4)


def test_a_loss_that_no_float_holds_the_perplexity_of() -> None:
    assert perplexity(709.0) == math.exp(709) and perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(710.0) is None


def test_splits_budgets_and_several_directories(sampler: Sampler, shards: Path) -> None:
    opened = sampler.opened
    held, train = (
        held_out_loss(opened, Shards({"data": shards}, 24, 480, 0, split=split))
        for split in ("held_out", "train")
    )
    assert held["loss"] != train["loss"] and held["tokens"] <= 480
    both = held_out_loss(opened, Shards({"a": shards, "b": shards}, 24, 480, 0))
    assert set(both["sources"]) == {"a", "b"}
    assert both["loss"] == pytest.approx(
        np.mean([each["loss"] for each in both["sources"].values()]), rel=0.05
    )


def test_of_conversations_the_answers_count(sampler: Sampler, tiny_tokenizer: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"the cat {i}", "completion": "sat on the mat" * (1 + i % 2)} for i in range(30)]
    write_lines(tmp_path / "a.jsonl", records)
    manifest = build(
        [tmp_path / "a.jsonl"], tiny_tokenizer, tmp_path / "out", workers=1, held_out=0.5, chat=True
    )
    found = held_out_loss(sampler.opened, Shards({"data": tmp_path / "out"}, CONTEXT, 10**6, 0))
    assert found["tokens"] == sum(shard.loss_tokens or 0 for shard in manifest.split("held_out")) > 0


def test_shards_that_do_not_fit_are_refused(sampler: Sampler, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use a shorter --seq-len"):
        held_out_loss(sampler.opened, Shards({"data": shards}, CONTEXT + 1, 480, 0))
    manifest = json.loads((shards / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_hash": "other"}))
    with pytest.raises(ConfigError, match="built with another tokenizer"):
        check_tokenizer(sampler.opened, tmp_path)
    small = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"shards": small}))
    with pytest.raises(ConfigError, match="has 0 held_out tokens in its longest shard"):
        held_out_loss(sampler.opened, Shards({"data": tmp_path}, 24, 480, 0))


def test_memorisation_is_what_greedy_decoding_gives_back(sampler: Sampler, shards: Path) -> None:
    probe = Probe(documents=20, prefix=4, suffix=3, seed=1)
    manifest = check_tokenizer(sampler.opened, shards)
    found = memorisation(sampler, shards, probe)
    for split in ("train", "held_out"):
        texts = draw_documents(shards, manifest, split, probe)
        assert found[split]["documents"] == len(texts) and len(texts) > 5
        matched = []
        for text in texts:
            (drawn,) = sampler.generator.generate(
                [Request(text[:4].tolist(), Sampling(max_tokens=3, temperature=0))]
            )[0]
            same = [a == b for a, b in zip(drawn.tokens, text[4:].tolist(), strict=False)]
            matched.append(next((i for i, each in enumerate(same) if not each), len(same)))
        assert found[split]["matched"]["value"] == pytest.approx(np.mean(matched))
        assert found[split]["extractable"]["value"] == pytest.approx(np.mean([m == 3 for m in matched]))
    for name, value in found["difference"].items():
        one, other = found["train"][name], found["held_out"][name]
        assert value["value"] == pytest.approx(one["value"] - other["value"])
        assert value["stderr"] == pytest.approx(math.hypot(one["stderr"], other["stderr"]))


def test_a_document_learned_by_heart_is_found(sampler: Sampler, shards: Path, tmp_path: Path) -> None:
    """Training documents that the model itself wrote come back whole."""
    from drivetrain.data.shard_writer import ShardWriter
    from drivetrain.data.shards import Manifest

    manifest = Manifest.read(shards)
    rng = np.random.default_rng(2)
    infos = []
    for split in ("train", "held_out"):
        writer = ShardWriter(tmp_path, f"{split}_00000", split, manifest.dtype)
        for _ in range(6):
            prefix = rng.integers(97, 120, 4).tolist()
            suffix = rng.integers(97, 120, 5).tolist()
            if split == "train":
                sampling = Sampling(max_tokens=5, temperature=0)
                (drawn,) = sampler.generator.generate([Request(prefix, sampling)])[0]
                suffix = drawn.tokens
            writer.add(np.array([*prefix, *suffix, manifest.eos_id], dtype=np.uint16))
        infos.append(writer.close())
    manifest.shards = infos
    manifest.write(tmp_path)
    found = memorisation(sampler, tmp_path, Probe(documents=6, prefix=4, suffix=5))
    assert found["train"]["extractable"] == {"value": 1, "stderr": 0}
    assert found["train"]["matched"]["value"] == 5
    assert found["difference"]["extractable"]["value"] == 1 - found["held_out"]["extractable"]["value"] > 0.5
    assert len(found["examples"]) == 3
    assert all(each["generated"] == each["suffix"] and each["matched"] == 5 for each in found["examples"])
    with pytest.raises(DataError, match="0 train documents of more than 90 tokens"):
        memorisation(sampler, tmp_path, Probe(prefix=45, suffix=45))
    with pytest.raises(ConfigError, match="longer than the model's max_seq_len=96"):
        memorisation(sampler, tmp_path, Probe(prefix=90, suffix=45))
