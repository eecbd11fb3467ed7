"""Every wrong input and the exact sentence that it gets."""

from dataclasses import fields
from pathlib import Path

import pytest

from drivetrain.conf.compose import compose, options
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import SCHEMAS, Kernels

TOP = (
    "run_dir, seed, kernels, tokenizer, objective, model, stage, lora, engine, data, optim, cluster, tracker, "
    "checkpoint, alarms, experiment"
)
STAGE = ", ".join(
    dict.fromkeys(
        field.name for stage in SCHEMAS["stage"].values() for field in fields(stage) if field.name != "name"
    )
)
MIXTURE = "write data.mixture={NAME: {path: DIR, weight: 1.0}}"
NO_SCALING = (
    "model.rope_scaling is null in this model and cannot be set by a word; "
    "write it in the model's file, or choose a model that has it, such as model=llama3_1b"
)


def either(names: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


WORDS = {
    # unknown keys
    "optim.lrr=1": "unknown key optim.lrr; did you mean optim.lr?",
    "stage.step=10": "unknown key stage.step; did you mean stage.steps?",
    "optm.lr=1": "unknown key optm; did you mean optim?",
    "lr=1": "unknown key lr; did you mean optim.lr?",
    "optim.steps=5": "unknown key optim.steps; did you mean stage.steps?",
    "Engine=fsdp": "unknown key Engine; did you mean engine?",
    "stage.zzz=1": f"unknown key stage.zzz; stage has {STAGE}",
    "zzz=1": f"unknown key zzz; the keys are {TOP}",
    "optim@foo=adamw": "unknown key optim@foo; did you mean optim?",
    "hydra.foo=1": "unknown key hydra.foo; Hydra has none of that name",
    "optim.lr.x=3": "unknown key optim.lr.x; optim.lr is a number",
    # keys of another option
    "stage.too_long=drop": "stage.too_long belongs to stage=sft; add stage=sft",
    "stage=sft stage.z_loss=1": "stage.z_loss belongs to stage=pretrain; add stage=pretrain",
    "engine.zero_stage=3": "engine.zero_stage belongs to engine=zero; add engine=zero",
    "engine=zero engine.reshard_after_forward=true": (
        "engine.reshard_after_forward belongs to engine=fsdp; add engine=fsdp"
    ),
    "optim.matrix_lr=1": "optim.matrix_lr belongs to optim=muon; add optim=muon",
    "tracker.project=x": "tracker.project belongs to tracker=wandb; add tracker=wandb",
    # options
    "model=lama": (
        f"unknown option model=lama; model can be {either(options('model'))}; did you mean model=llama3_8b?"
    ),
    "stage=zzz": f"unknown option stage=zzz; stage can be {either(options('stage'))}",
    "engine=zer0": "unknown option engine=zer0; engine can be fsdp or zero; did you mean engine=zero?",
    "engine=fsdp_schema": "unknown option engine=fsdp_schema; engine can be fsdp or zero",
    "engine=": "unknown option engine=; engine can be fsdp or zero",
    "engine=null": "unknown option engine=null; engine can be fsdp or zero",
    "engine=[fsdp,zero]": "unknown option engine=[fsdp,zero]; engine can be fsdp or zero",
    "optim=3": "unknown option optim=3; optim can be adamw or muon",
    "experiment=zzz": (f"unknown option experiment=zzz; experiment can be {either(options('experiment'))}"),
    "engine=fsdp engine=zero": "engine is chosen twice, engine=fsdp and engine=zero; keep one",
    "engine.name=zero": "engine.name follows from the option; write engine=zero",
    # types
    "optim.lr=abc": "optim.lr must be a number, not abc",
    "stage.steps=1.5": "stage.steps must be a whole number, not 1.5",
    "stage.steps=1e3": "stage.steps must be a whole number, not 1e3; write 1000",
    "stage.steps=10M": "stage.steps must be a whole number, not 10M",
    "stage.steps=null": "stage.steps must be a whole number, not null",
    "seed=true": "seed must be a whole number, not true",
    "engine.compile=maybe": "engine.compile must be true or false, not maybe",
    "model.sliding_window=wide": "model.sliding_window must be a whole number or null, not wide",
    "stage.sample_prompts=a": "stage.sample_prompts must be a list such as [a,b], not a",
    "engine.precision=fp8": "engine.precision must be bf16 or fp32, not fp8",
    "engine.precision=BF16": "engine.precision must be bf16 or fp32, not BF16; did you mean bf16?",
    "kernels=refrence": (
        f"kernels must be {either([k.name for k in Kernels])}, not refrence; did you mean reference?"
    ),
    "stage=sft stage.too_long=cut": "stage.too_long must be drop or truncate, not cut",
    "engine.checkpointing=true": "engine.checkpointing must be none, block or selective, not true",
    # missing values and references
    "stage.steps=???": "stage.steps has no value; set stage.steps to a whole number",
    "run_dir=${nope.x}": "run_dir refers to ${nope.x}, and there is no such key",
    "run_dir=${oc.env:DRIVETRAIN_NOT_SET}": (
        "run_dir refers to the environment variable DRIVETRAIN_NOT_SET, which is not set"
    ),
    "run_dir=${nope:1}": "run_dir refers to ${nope:...}, and nothing is called nope; quote a literal $",
    # words that are no setting
    "foo": "foo is no setting; write key=VALUE",
    "engine": "engine is no setting; write engine=VALUE",
    "--fast": "--fast is no setting; write key=VALUE",
    "=3": "=3 has no key; write key=VALUE",
    "": "an empty word is no setting; write key=VALUE",
    "data.path=a=b": (
        "the value in data.path=a=b has characters of its own meaning; quote it: \"data.path='a=b'\""
    ),
    "run_dir='x": "run_dir='x has a ' that is not closed",
    "data.mixture={a": "data.mixture={a has a { that is not closed",
    "stage.sample_prompts=[a]]": "stage.sample_prompts=[a]] has a ] that nothing opens",
    "optim.lr=1,2": (
        "optim.lr=1,2 gives optim.lr several values and this is one run; keep one of them, or add -m to sweep"
    ),
    # Hydra's prefixes
    "+optim.lr=3": "optim.lr exists already; write optim.lr=3 without the +",
    "+optim.lrr=3": "unknown key optim.lrr; did you mean optim.lr?",
    "++zzz=3": f"unknown key zzz; the keys are {TOP}",
    "+experiment=gpt2_124m": ("experiment has an option already; write experiment=gpt2_124m without the +"),
    "+engine=zero": "engine has an option already; write engine=zero without the +",
    "~optim.lr": "~optim.lr would take optim.lr away and a run needs it; set it with optim.lr=VALUE",
    "~optim": "~optim would take optim away and a run needs it; set it with optim=VALUE",
    "~optim.lrr": "unknown key optim.lrr; did you mean optim.lr?",
    # mixtures, and the one optional node
    "data.mixture={a:{path:x,wieght:2}}": (
        "unknown key data.mixture.a.wieght; did you mean data.mixture.a.weight?"
    ),
    "data.mixture={a:{path:x,zzz:2}}": f"unknown key data.mixture.a.zzz; {MIXTURE}",
    "data.mixture={a:{weight:2}}": "data.mixture.a.path has no value; set data.mixture.a.path to text",
    "data.mixture={a:{path:x,weight:abc}}": "data.mixture.a.weight must be a number, not abc",
    "data.mixture={a:3}": f"data.mixture.a is no source of the mixture; {MIXTURE}",
    "data.mixture.a.path=x": f"data.mixture.a.path is no source of the mixture; {MIXTURE}",
    "data.mixture=3": f"data.mixture is no source of the mixture; {MIXTURE}",
    "model.rope_scaling.factor=3": NO_SCALING,
    "model.rope_scaling={factor:3}": NO_SCALING,
}


@pytest.mark.parametrize("words", WORDS)
def test_wrong_words_get_one_plain_sentence(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words.split(" "))
    assert str(caught.value) == WORDS[words]


FIRST = "# @package _global_\n"
FILES = {
    "key": (FIRST + "optim: {lrr: 1}", "experiment/mine.yaml: unknown key optim.lrr; did you mean optim.lr?"),
    "root": (FIRST + "sed: 3", "experiment/mine.yaml: unknown key sed; did you mean seed?"),
    "type": (FIRST + "optim: {lr: abc}", "experiment/mine.yaml: optim.lr must be a number, not abc"),
    "enum": (
        FIRST + "engine: {precision: fp8}",
        "experiment/mine.yaml: engine.precision must be bf16 or fp32, not fp8",
    ),
    "option": (
        FIRST + "defaults: [override /optim: moon, _self_]",
        "unknown option optim=moon in experiment=mine; optim can be adamw or muon; did you mean optim=muon?",
    ),
    "no override": (
        FIRST + "defaults: [/optim: muon, _self_]",
        "the experiment's file chooses optim without `override`; write `override /optim: muon`",
    ),
    "no package": (
        "optim: {lr: 3.0}",
        "experiment/mine.yaml: the file lacks its first line; begin it with `# @package _global_`",
    ),
    "no YAML": (
        FIRST + "optim: {lr: [\n",
        "{folder}/experiment/mine.yaml is not YAML: "
        "expected the node content, but found '<stream end>' in line 3",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_experiment_is_named(case: str, tmp_path: Path) -> None:
    text, expected = FILES[case]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert str(caught.value) == expected.replace("{folder}", str(tmp_path))


@pytest.mark.parametrize(
    "word",
    [
        "++optim.lr=3",
        "model=tiny model=tiny",
        "data.path=a_b/c-d.e",
        "stage.steps=1_000",
        "model=llama3_1b model.rope_scaling.factor=4",
        "model=llama3_1b model.rope_scaling=null",
        "run_dir=runs/${now:%Y-%m-%d}",
    ],
)
def test_these_words_are_right(word: str) -> None:
    compose(word.split(" "))
