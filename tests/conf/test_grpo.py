"""Each wrong setting of stage=grpo gets one sentence."""

from pathlib import Path

import pytest

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.validate import validate

WRONG = {
    "stage.max_completion=2048": (
        "stage.max_completion=2048 leaves no room for a prompt in stage.seq_len=1024; use a longer seq_len"
    ),
    "stage.group_size=1": (
        "stage.group_size=1 has nothing to compare a completion with; use 2 or more, or stage.variant=reinforce_pp"
    ),
    "cluster.nproc=64": (
        "stage.prompts_per_step=32 is too few for 64 ranks, each of which samples some of them; use 64 or more"
    ),
    "stage.updates=4": (
        "stage.save_every=50 is not a multiple of stage.updates=4, so a resume would begin in the middle of a "
        "rollout; use a multiple"
    ),
    "stage.sample_prompts=[a]": (
        "stage.sample_prompts is not asked in stage=grpo, which shows its own rollouts; leave it out"
    ),
    "stage.environment=chess": (
        "stage.environment=chess is not known; it begins with reasoning_gym:, questions:, verifiers: or custom:, "
        "as in reasoning_gym:chain_sum?max_terms=3"
    ),
    "stage.environment='custom:thing'": (
        "stage.environment=custom:thing: thing is not of the form package.module:name; correct it"
    ),
    "stage.environment='questions:nowhere.jsonl'": (
        "stage.environment=questions:nowhere.jsonl: nowhere.jsonl does not exist; check the path"
    ),
    "stage.environment='questions:/?held_out=nowhere.jsonl'": (
        "stage.environment=questions:/?held_out=nowhere.jsonl: nowhere.jsonl does not exist; check the path"
    ),
    "stage.environment='reasoning_gym:gcd?tools=search&documents=nowhere'": (
        "stage.environment=reasoning_gym:gcd?tools=search&documents=nowhere: nowhere does not exist; check the path"
    ),
    "stage.environment_weight=0": (
        "stage.environment_weight=0 and no part of stage.rewards has a weight, so nothing would be learned; give "
        "one of them a weight"
    ),
    "stage.rewards.regex.weight=1 stage.rewards.regex.pattern='['": (
        "stage.rewards.regex.pattern='[' is no regular expression: unterminated character set at position 0; "
        "correct it"
    ),
    "stage.rewards.format.weight=1 stage.rewards.format.pattern='a**'": (
        "stage.rewards.format.pattern='a**' is no regular expression: multiple repeat at position 2; correct it"
    ),
    "stage.rewards.overlong.weight=1 stage.rewards.overlong.buffer=513": (
        "stage.rewards.overlong.buffer=513 is not within stage.max_completion=512; use less"
    ),
    "stage.rewards.rubric.weight=1 stage.rewards.rubric.model=m stage.rewards.rubric.per_minute=10 "
    "stage.prompts_per_step=32 stage.group_size=8 cluster.nproc=1": (
        "stage.rewards.rubric.per_minute=10 takes 1536 s for the 256 completions of a rank, and "
        "stage.rollout.timeout_seconds=600 gives them up before; raise one of them"
    ),
    "stage.rewards.rubric.weight=1": (
        "stage.rewards.rubric.model is empty; give the name that the server knows"
    ),
    "stage.rewards.custom.weight=1 stage.rewards.custom.target=me": (
        "stage.rewards.custom.target='me' is not of the form package.module:name; correct it"
    ),
    "stage.rollout.max_staleness=1 stage.updates=2": (
        "stage.rollout.max_staleness=1 lets sampling run ahead of every step, and stage.updates=2 has steps share "
        "a rollout; use stage.updates=1"
    ),
    "stage.rollout.engine=vllm stage.rollout.max_staleness=1": (
        "stage.rollout.engine=vllm takes turns with training on one GPU and cannot run ahead of it; use "
        "stage.rollout.engine=vllm_server, or stage.rollout.max_staleness=0"
    ),
    "stage.rollout.engine=vllm cluster.device=cpu": (
        "stage.rollout.engine=vllm needs GPUs and cluster.device=cpu has none; use stage.rollout.engine=builtin"
    ),
    "stage.rollout.engine=vllm stage.rollout.copy=true": (
        "stage.rollout.copy=true is for stage.rollout.engine=builtin, and this is vllm; leave it out"
    ),
    "stage.rollout.timeout_seconds=900": (
        "stage.rollout.timeout_seconds=900 with stage.rollout.retries=1 is longer than the 1800 s that ranks wait "
        "for each other; use less"
    ),
    "stage.rollout.engine=endpoint": (
        "stage.rollout.server.model is empty; give the name that the server at stage.rollout.server.urls knows"
    ),
    "stage.rollout.engine=endpoint stage.rollout.server.model=m stage.rollout.server.urls=[]": (
        "stage.rollout.server.urls is empty; give at least one, as in [http://127.0.0.1:8000/v1]"
    ),
    "stage.rollout.engine=vllm_server stage.rollout.server.model=m stage.rollout.server.token_ids=false": (
        "stage.rollout.server.token_ids=false would train on tokens that the sampler may not have drawn; leave it "
        "out with stage.rollout.engine=vllm_server"
    ),
    "stage.rollout.vllm.memory=2": (
        "stage.rollout.vllm.memory=2.0 is out of range; it must be above 0 and at most 1"
    ),
    "stage.kl_coef=0.1 stage.kl_estimator=k1": (
        "stage.kl_estimator=k1 in the loss has a gradient that is zero on average, so it would do nothing; use k2 "
        "or k3, or stage.kl_in=reward"
    ),
    "data.path=x": (
        "stage=grpo makes its problems itself (stage.environment); leave data.path and data.mixture out"
    ),
    "model.init_from=null": (
        "stage=grpo practises what a model can do now and then; pass one that answers, as stage=sft makes, with "
        "model.init_from=DIR"
    ),
    "stage.clip_low=2": "stage.clip_low=2.0 is out of range; it must be above 0 and at most 1",
    "objective=eval/bits_per_byte": (
        "objective=eval/bits_per_byte is not measured by this run; it must be loss, grad_norm, step_seconds, "
        "tokens_per_second, mfu, eval/loss, eval/error or eval/completion_tokens_mean"
    ),
}


def words(saved_run: Path, *more: str) -> list[str]:
    return [
        "stage=grpo",
        "stage.seq_len=1024",
        "stage.max_completion=512",
        f"model.init_from={saved_run}",
        *more,
    ]


def test_it_needs_no_data(saved_run: Path) -> None:
    config = compose(words(saved_run))
    validate(config)
    assert config.stage.tokens_per_step == 32 * 8 * 1024
    validate(
        compose(words(saved_run, "cluster.nproc=3", "stage.micro_batch=5"))
    )  # rows are shared out as they are
    validate(compose(words(saved_run, "model.init_from=null", f"run_dir={saved_run}")))  # as a resume asks
    (saved_run / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json; pass tokenizer=DIR"):
        validate(compose(words(saved_run)))


@pytest.mark.parametrize("wrong", WRONG)
def test_one_fault_gets_one_sentence(wrong: str, saved_run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose(words(saved_run, *wrong.split(" "))))
    assert str(caught.value) == WRONG[wrong]


def test_the_tokens_of_a_step_follow_from_other_keys(saved_run: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"stage\.tokens_per_step=65536 follows from prompts_per_step, group_size"
    ):
        compose(words(saved_run, "stage.tokens_per_step=65536"))
