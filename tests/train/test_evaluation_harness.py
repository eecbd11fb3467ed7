"""EleutherAI's harness on our models, beside its own backend for transformers. Needs the extra `eval`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.data.tokenizer import load_tokenizer
from drivetrain.train.evaluation.tasks import TaskOptions, load_task, run_task
from drivetrain.train.serve import Sampler

pytest.importorskip("lm_eval", reason="pip install 'drivetrain[eval]'")

RECORDS: list[dict[str, Any]] = [
    {"context": "the cat sat on the", "choices": ["mat", "cat; the", "x"], "answer": 0},
    {"context": "on the mat;", "choices": ["the cat", "mat", "zzz"], "answer": 1},
    {"context": "cat", "choices": ["sat", "on", "the cat sat on the mat"], "answer": 2},
    {"context": "a mat", "choices": ["is", "was", "on the mat; sat"], "answer": 0},
]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
""",
    "free": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match}
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}} {{choices[2]}} {{context * 8}}"
metric_list:
  - {metric: bits_per_byte}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks, as the harness reads them from files."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    head = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {made}/data.jsonl}}}}\ntest_split: test\n"
    )
    for name, body in TASKS.items():
        (made / f"{name}.yaml").write_text(f"task: local_{name}\n{head}{body}")
    return made


@pytest.fixture(scope="module")
def source(tiny_hf: Callable[..., Path]) -> Path:
    return tiny_hf(vocab=268)  # transformers would draw the padding, the sampler does not


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def numbers(found: Any) -> dict[str, dict[str, float]]:
    return {
        task: {key: value for key, value in result.items() if isinstance(value, float)}
        for task, result in found["results"].items()
    }


@pytest.fixture(scope="module")
def begun(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model; its tokenizer begins a text with a token."""
    folder = tmp_path_factory.mktemp("begun") / "model"
    shutil.copytree(source, folder)
    tokenizer = load_tokenizer(folder)
    ids = [("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|im_start|>"}))
    return folder


def same_numbers(source: Path, folder: Path, tasks: list[str], **theirs_options: Any) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from drivetrain.train.evaluation.harness import DrivetrainLM

    def run(model: Any) -> Any:
        paths = [str(folder / f"{name}.yaml") for name in tasks]
        return lm_eval.simple_evaluate(
            model=model, tasks=paths, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
        )

    ours = run(DrivetrainLM(source))
    theirs = run(HFLM(pretrained=str(source), dtype="float32", device="cpu", batch_size=1, **theirs_options))
    assert set(numbers(ours)) == {f"local_{name}" for name in tasks}
    for task, found in numbers(theirs).items():
        assert numbers(ours)[task] == pytest.approx(found, abs=1e-5)
    for task, samples in ours["samples"].items():
        for one, other in zip(samples, theirs["samples"][task], strict=True):
            for mine, their in zip(_flat(one["resps"]), _flat(other["resps"]), strict=True):
                assert mine == (pytest.approx(their, abs=1e-3) if isinstance(their, float) else their)


def test_numbers_are_those_of_the_harness_on_transformers(source: Path, folder: Path) -> None:
    same_numbers(source, folder, list(TASKS))


def test_texts_begin_as_they_do_there(begun: Path, folder: Path) -> None:
    same_numbers(begun, folder, ["choices", "free"])
    # The first token of all is given and not scored; there it is both, unless it is not added to the text.
    same_numbers(begun, folder, ["rolling"], add_bos_token=False)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [each for item in value for each in _flat(item)]
    # The sampler leaves out a last character of which only some bytes came.
    return [value.rstrip("\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value]


def test_our_own_tasks_have_its_accuracies(source: Path, folder: Path) -> None:
    from drivetrain.train.evaluation.harness import run_harness

    sampler, options = Sampler(source), TaskOptions()
    ours, rows = run_task(sampler, load_task(str(folder / "data.jsonl"), options), options)
    named = [str(folder / "choices.yaml")]
    found, answered = run_harness(sampler, named, shots=None, limit=None, chat=False, seed=0)
    theirs = found["lm_eval:local_choices"]
    assert theirs["questions"] == len(RECORDS) == len(answered)
    for our_name, their_name in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
        assert theirs["metrics"][their_name] == pytest.approx(ours["metrics"][our_name])
    likelihoods = [float(resp[0]) for row in answered for resp in row["filtered_resps"]]
    assert likelihoods == pytest.approx([each for row in rows for each in row["logprobs"]], abs=1e-4)


def test_the_model_has_a_name_there_and_chats(source: Path, folder: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import drivetrain.train.evaluation.harness  # noqa: F401

    found = lm_eval.simple_evaluate(
        model="drivetrain",
        model_args=f"source={source}",
        tasks=[str(folder / "choices.yaml"), str(folder / "free.yaml")],
        apply_chat_template=True,
        task_manager=TaskManager(include_defaults=False),
        limit=2,
        bootstrap_iters=0,
    )
    asked = found["samples"]["local_free"][0]["arguments"]
    assert "<|im_start|>user\nthe cat sat on the<|im_end|>" in json.dumps(asked).replace("\\n", "\n")
    assert found["n-samples"]["local_choices"]["effective"] == 2


def test_what_the_harness_cannot_run_is_one_sentence(source: Path, folder: Path) -> None:
    from drivetrain.train.evaluation.harness import run_harness, sampling_of

    sampler = Sampler(source)
    none: dict[str, Any] = {"shots": None, "limit": None, "chat": False, "seed": 0}
    with pytest.raises(ConfigError, match="none of the harness's tasks and no file"):
        run_harness(sampler, ["no_such_task"], **none)  # takes its ten seconds
    (folder / "missing.yaml").write_text(
        (folder / "free.yaml").read_text().replace("data.jsonl", "no.jsonl").replace("local_free", "local_no")
    )
    with pytest.raises(DrivetrainError, match="lm_eval cannot run"):
        run_harness(sampler, [str(folder / "missing.yaml")], **none)
    with pytest.raises(ConfigError, match="generation_kwargs have num_beams"):
        sampling_of({"until": "\n", "num_beams": 4})
    assert sampling_of({"until": "\n", "do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling_of({"temperature": 0.7, "max_new_tokens": 9}).max_tokens == 9
