"""A prompt as part of its completion, with the log-probabilities of its tokens: what lm-eval asks for over HTTP."""

import importlib
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from drivetrain.model.draw import Sampling
from drivetrain.train.evaluation.score import Pair, Scorer
from drivetrain.train.serve import Sampler

# As lm-eval's `local-completions` asks for a log-likelihood.
ASKED: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0,
    "max_tokens": 1,
    "logprobs": 1,
    "seed": 1,
    "echo": True,
}


def likelihood(choice: Any, context: int) -> tuple[float, bool]:
    """As it reads the answer: the last token is the one that was generated."""
    taken = choice.logprobs.token_logprobs[context:-1]
    tops = choice.logprobs.top_logprobs[context:-1]
    return sum(taken), all(one == max(top.values()) for one, top in zip(taken, tops, strict=True))


def test_log_likelihoods_are_those_of_evaluation(client: openai.OpenAI, sampler: Sampler) -> None:
    tokenizer = sampler.tokenizer
    greedy = sampler.complete(sampler.prompts.continued("the cat", Sampling(max_tokens=6, temperature=0)))[0][
        "tokens"
    ]
    texts = [("the cat", " sat on"), ("where is", " the dog? it is"), ("a", "äöü")]
    pairs = [(tokenizer.encode(text).ids, tokenizer.encode(end).ids) for text, end in texts]
    pairs.append((tokenizer.encode("the cat").ids, greedy))
    found = client.completions.create(prompt=[[*start, *end] for start, end in pairs], **ASKED)
    wanted = Scorer(sampler.opened).score([Pair(tuple(start), tuple(end)) for start, end in pairs])
    for choice, (start, end), score in zip(found.choices, pairs, wanted, strict=True):
        logprob, is_greedy = likelihood(choice, len(start))
        assert logprob == pytest.approx(score.logprob, abs=1e-3)
        assert is_greedy is score.greedy
        assert len(choice.logprobs.tokens) == len(start) + len(end) + 1
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert [score.greedy for score in wanted] == [False, False, False, True]
    usage = found.usage
    assert usage is not None
    assert usage.prompt_tokens == sum(len(start) + len(end) for start, end in pairs)
    assert usage.completion_tokens == 4


def test_the_prompt_is_the_beginning_of_the_text(client: openai.OpenAI, sampler: Sampler) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the cät", "seed": 3, "max_tokens": 8, "n": 2}
    plain = client.completions.create(**asked, logprobs=0).choices
    for one, other in zip(
        client.completions.create(**asked, echo=True, logprobs=0).choices, plain, strict=True
    ):
        assert one.text == "the cät" + other.text
        prompt = sampler.tokenizer.encode("the cät").ids
        assert one.logprobs.tokens[len(prompt) :] == other.logprobs.tokens
        assert one.logprobs.token_logprobs[len(prompt) :] == pytest.approx(
            other.logprobs.token_logprobs, abs=1e-4
        )
        assert one.logprobs.text_offset[len(prompt) :] == [7 + at for at in other.logprobs.text_offset]
        assert one.logprobs.text_offset[0] == 0 and one.logprobs.top_logprobs is None
    without = client.completions.create(**asked, echo=True).choices[0]
    assert without.logprobs is None and without.text == "the cät" + plain[0].text


def test_a_prompt_alone_is_scored(client: openai.OpenAI, sampler: Sampler) -> None:
    ids = sampler.tokenizer.encode("the cat sat").ids
    whole = client.completions.create(prompt=ids, **ASKED).choices[0]
    alone = client.completions.create(prompt=ids, **ASKED | {"max_tokens": 0, "temperature": 1})
    (choice,) = alone.choices
    assert (choice.text, choice.finish_reason) == ("the cat sat", "length")
    assert choice.logprobs.token_logprobs == whole.logprobs.token_logprobs[:-1]
    assert alone.usage.completion_tokens == 0 and alone.usage.prompt_tokens == len(ids)
    (one,) = client.completions.create(prompt=ids[:1], **ASKED | {"max_tokens": 0}).choices
    assert one.logprobs.token_logprobs == [None]


def test_a_stream_begins_with_the_prompt(client: openai.OpenAI) -> None:
    asked = ASKED | {"prompt": ["the cat", "a dog"], "max_tokens": 7}
    whole = client.completions.create(**asked).choices
    texts, logprobs, tops = ["", ""], [[], []], [[], []]
    for chunk in client.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        logprobs[choice.index] += choice.logprobs.token_logprobs
        tops[choice.index] += choice.logprobs.top_logprobs
    assert texts == [choice.text for choice in whole]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole]
    assert tops == [choice.logprobs.top_logprobs for choice in whole]


def test_what_is_likeliest_is_named(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(prompt="the cat sat", **ASKED).choices
    tops = choice.logprobs.top_logprobs[1:]
    for text, taken, top in zip(
        choice.logprobs.tokens[1:], choice.logprobs.token_logprobs[1:], tops, strict=True
    ):
        assert top[text] <= max(top.values()) and 1 <= len(top) <= 2
        assert top[text] == taken or len(top) == 1  # two tokens of one text
    assert tops[-1] == {choice.logprobs.tokens[-1]: choice.logprobs.token_logprobs[-1]}


TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "free": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", " "], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}} {{choices[1]}} {{context * 8}}"
metric_list: [{metric: bits_per_byte}]
""",
}
RECORDS = [
    {"context": "the cat sat on the", "choices": ["mat", "cat; the"], "answer": 0},
    {"context": "where is", "choices": ["the dog?", "it"], "answer": 1},
    {"context": "it is", "choices": ["here.", "there."], "answer": 0},
]


def test_lm_eval_runs_its_tasks_over_http(
    server: Any, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of `DrivetrainLM` in this process. Needs the extra `eval` and lm-eval's own `api`."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'drivetrain[eval]'")
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    importlib.import_module("lm_eval.models")  # its own, which only a first model brings along
    from lm_eval.tasks import TaskManager

    from drivetrain.train.evaluation.harness import DrivetrainLM

    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": tmp_path,
        "OPENAI_API_KEY": server.key,
    }.items():
        monkeypatch.setenv(name, str(value))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    for name, body in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: local_{name}\n{head}{body}")
    tasks = [str(tmp_path / f"{name}.yaml") for name in TASKS]

    def run(model: Any, **options: Any) -> Any:
        manager = TaskManager(include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=model, tasks=tasks, bootstrap_iters=0, task_manager=manager, **options
        )
        return found["samples"]

    url = f"{server.url}/v1/completions"
    model_args = f"model=tiny,base_url={url},tokenizer={talker},tokenizer_backend=huggingface,batch_size=2"
    over_http, here = run("local-completions", model_args=model_args), run(DrivetrainLM(talker))
    for task, samples in here.items():
        for one, other in zip(samples, over_http[task], strict=True):
            mine, theirs = (json.loads(json.dumps(sample["resps"])) for sample in (one, other))
            assert _flat(theirs) == [
                pytest.approx(each, abs=1e-3) if isinstance(each, float) else each for each in _flat(mine)
            ]


def _flat(value: Any) -> list[Any]:
    return [each for item in value for each in _flat(item)] if isinstance(value, list) else [value]
