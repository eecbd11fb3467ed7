import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.conf.check_data import data_problems
from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import RunConfig
from drivetrain.conf.tokenizer_file import hash_of
from drivetrain.conf.validate import validate

Make = Callable[..., Path]
BUILD = "`drivetrain data build INPUT... --tokenizer DIR --out DIR`"


def problem(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config)
    return str(caught.value)


def test_data_is_needed_once(shards: Make) -> None:
    data = shards()
    assert problem(compose([])) == f"data.path is missing: build shards with {BUILD} and pass data.path=DIR"
    both = compose([f"data.path={data}", f"data.mixture={{a: {{path: {data}}}}}"])
    assert problem(both) == f"data.path={data} and data.mixture are both given; keep one"


def test_directories_must_hold_a_manifest(shards: Make, tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty", shards("broken")
    empty.mkdir()
    (broken / "manifest.json").write_text('{"shards": []}')
    words = f"data.mixture={{a: {{path: {tmp_path}/none}}, b: {{path: {empty}}}, c: {{path: {broken}}}}}"
    assert problem(compose([words])).splitlines() == [
        f"data.mixture.a.path={tmp_path}/none is no directory; build shards with {BUILD}",
        f"data.mixture.b.path={empty} has no manifest.json, so its build did not finish; run {BUILD}",
        f"data.mixture.c.path={broken} has a manifest.json that cannot be read as one; build the data again",
    ]


def test_data_must_fit_the_model_and_the_stage(shards: Make) -> None:
    data = shards(vocab_size=50257, train=1024, held_out=1024)
    assert problem(compose([f"data.path={data}"])).splitlines() == [
        f"data.path={data} has a vocabulary of 50257 tokens and model.vocab_size=2048; "
        "use model.vocab_size=50304",
        f"data.path={data} has 1024 tokens to train on in its longest shard and stage.seq_len=1024 needs 1025; "
        "build more data, or shorten stage.seq_len",
        f"data.path={data} has 1024 held-out tokens in its longest shard and stage.eval_every=100 needs 1025; "
        "build it with a larger --held-out, or use stage.eval_every=0",
    ]
    enough = shards("enough", train=1025, held_out=0)
    validate(compose([f"data.path={enough}", "stage.eval_every=0"]))


def test_a_window_lies_in_one_shard_of_every_source(shards: Make) -> None:
    """4,000 tokens in four shards hold no window of 1,025, whatever the other source has."""
    long, short, silent = shards("long"), shards("short", parts=4, train=4000), shards("silent", held_out=0)
    config = compose([f"data.mixture={{a: {{path: {long}}}, b: {{path: {short}}}, c: {{path: {silent}}}}}"])
    lines = problem(config).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        f"data.mixture.b.path={short} has 1000 tokens to train on in its longest shard"
    )
    assert lines[1].startswith(f"data.mixture.c.path={silent} has 0 held-out tokens in its longest shard")
    config.stage.eval_every = 0
    assert problem(config) == lines[0]


def test_fine_tuning_needs_conversations_and_pretraining_documents(shards: Make) -> None:
    documents, chats = shards("documents"), shards("chats", chat=True)
    validate(compose([f"data.path={chats}", "stage=sft"]))
    build = BUILD.replace("INPUT...", "INPUT... --chat")
    assert problem(compose([f"data.path={documents}", "stage=sft"])) == (
        f"data.path={documents} holds documents and stage=sft needs conversations; build them with {build}"
    )
    assert problem(compose([f"data.path={chats}"])) == (
        f"data.path={chats} holds conversations and stage=pretrain needs documents; build them with {BUILD}"
    )


def test_preferences_need_pairs(shards: Make) -> None:
    chats, pairs = shards("chats", chat=True), shards("pairs", chat=True, pairs=True)
    build = BUILD.replace("INPUT...", "INPUT... --pairs")
    for stage in ("dpo", "reward_model"):
        wanted = f"holds conversations and stage={stage} needs preference pairs; build them with {build}"
        assert f"data.path={chats} {wanted}" in problem(compose([f"data.path={chats}", f"stage={stage}"]))
        assert "holds" not in problem(compose([f"data.path={pairs}", f"stage={stage}"]))
    build = BUILD.replace("INPUT...", "INPUT... --chat")
    assert problem(compose([f"data.path={pairs}", "stage=sft"])) == (
        f"data.path={pairs} holds preference pairs and stage=sft needs conversations; build them with {build}"
    )
    silent = shards("silent", chat=True, pairs=True, held_out=0)
    wanted = f"data.path={silent} has no held-out preference pair and"
    assert wanted in problem(compose([f"data.path={silent}", "stage=dpo"]))


def test_fine_tuning_needs_a_conversation_in_every_split_it_reads(shards: Make) -> None:
    # Rows are made of conversations: none of them need be as long as a row.
    short, silent = shards("short", chat=True, train=30, held_out=20), shards("silent", chat=True, held_out=0)
    empty = shards("empty", chat=True, train=0)
    validate(compose([f"data.path={short}", "stage=sft"]))
    assert problem(compose([f"data.path={silent}", "stage=sft"])) == (
        f"data.path={silent} has no held-out conversation and stage.eval_every=100; build it with a larger "
        "--held-out, or use stage.eval_every=0"
    )
    validate(compose([f"data.path={silent}", "stage=sft", "stage.eval_every=0"]))
    assert problem(compose([f"data.path={empty}", "stage=sft"])) == (
        f"data.path={empty} has no conversation to train on; build it with a smaller --held-out"
    )


def test_the_weights_of_conversations_are_looked_at(shards: Make) -> None:
    data = shards(chat=True)
    (data / "train_0.weights").unlink()
    assert "train_0.weights: No such file" in problem(compose([f"data.path={data}", "stage=sft"]))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_every_file_of_the_manifest_is_looked_at(dtype: str, shards: Make) -> None:
    data = shards(parts=3, dtype=dtype)
    config = compose([f"data.path={data}"])
    validate(config)
    with (data / "train_1.bin").open("ab") as file:
        file.write(b"x")
    size = (data / "train_1.bin").stat().st_size
    says = f"data.path={data} is not what its manifest says: "
    assert problem(config) == (
        f"{says}train_1.bin has {size} bytes and not {size - 1}; build or copy the data again"
    )
    (data / "train_0.idx").unlink()
    (data / "held_out_2.bin").unlink()
    assert problem(config) == (
        f"{says}train_0.idx: No such file or directory, and 2 more files are wrong; build or copy the data again"
    )
    assert list(data_problems(config)) == [problem(config)]


def test_sources_share_a_tokenizer_and_have_weights(shards: Make) -> None:
    a, b = shards("a"), shards("b", tokenizer_hash="b" * 32)
    config = compose([f"data.mixture={{a: {{path: {a}}}, b: {{path: {b}}}}}"])
    assert problem(config) == (
        f"data.mixture.b.path={b} and data.mixture.a.path={a} were built with different tokenizers; "
        "build one of them again"
    )
    config = compose([f"data.mixture={{a: {{path: {a}, weight: 0}}, b: {{path: {a}, weight: inf}}}}"])
    assert problem(config).splitlines() == [
        "data.mixture.a.weight=0.0 is out of range; it must be above 0",
        "data.mixture.b.weight=inf is out of range; it must be above 0",
    ]


UNIGRAM = {"model": {"vocab": [["a", 0.0]]}, "added_tokens": [{"id": 2047}]}
BPE: dict[str, Any] = {"model": {"vocab": {"a": 2047}}, "added_tokens": [{"id": 5}]}


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (None, "tokenizer={path} has no tokenizer.json; leave tokenizer out"),
        ("{}", "{path}/tokenizer.json cannot be read as a tokenizer"),
        ({"model": {"vocab": {"a": 0, "b": 9}}, "added_tokens": []}, "tokenizer={path} has 10 tokens and"),
        (
            UNIGRAM,
            "tokenizer={path} is not the one that data.path={data} was built with, though as large; leave",
        ),
        (BPE, None),
        ({**BPE, "truncation": {"max_length": 8}}, None),
    ],
)
def test_a_given_tokenizer_is_the_datas(definition: Any, reason: str | None, shards: Make) -> None:
    data = shards(tokenizer_hash=hash_of(BPE))
    path = data / "tokenizer"
    path.mkdir()
    if definition is not None:
        text = definition if isinstance(definition, str) else json.dumps(definition)
        (path / "tokenizer.json").write_text(text)
    config = compose([f"data.path={data}", f"tokenizer={path}"])
    if reason is None:
        validate(config)
    else:
        assert problem(config).startswith(reason.format(path=path, data=data))


def test_the_tokenizer_of_the_weights_is_the_datas_too(shards: Make, saved_run: Path) -> None:
    (saved_run / "tokenizer" / "tokenizer.json").write_text(json.dumps(BPE))
    other, data = shards("other"), shards("data", tokenizer_hash=hash_of(BPE))
    begun = f"model.init_from={saved_run}"
    validate(compose([f"data.path={data}", begun]))
    remedy = f"build the data with --tokenizer {saved_run / 'tokenizer'}"
    assert problem(compose([f"data.path={other}", begun])) == (
        f"the tokenizer of {begun} is not the one that data.path={other} was built with, though as large; {remedy}"
    )
    # A resume may name another directory of data: the run has its own copy of the tokenizer.
    validate(compose([f"data.path={data}", f"run_dir={saved_run}"]))
    assert problem(compose([f"data.path={other}", f"run_dir={saved_run}"])) == (
        f"the tokenizer in {saved_run} is not the one that data.path={other} was built with, though as large; "
        f"{remedy}"
    )
