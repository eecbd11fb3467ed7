"""EleutherAI's lm-evaluation-harness on our models: its tasks and its numbers, our forward passes.

    lm_eval.simple_evaluate(model=DrivetrainLM("RUN_DIR"), tasks=["arc_easy"])
    lm_eval.simple_evaluate(model="drivetrain", model_args="source=RUN_DIR", tasks=["arc_easy"])

The second after `import drivetrain.train.evaluation.harness`, which registers the name.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.data.chat import Chat
from drivetrain.data.tokenizer import chat_templates, text_ids, tokenizer_hash
from drivetrain.model.generate import Sampling
from drivetrain.train.evaluation.score import DTYPES, Advance, Pair, Scorer, Texts, silent
from drivetrain.train.evaluation.tasks import HARNESS, complete, cut_to_fit
from drivetrain.train.serve import Sampler, open_model

MAX_TOKENS = 256  # of a generation whose task does not say


@register_model("drivetrain")
class DrivetrainLM(TemplateLM):
    """A `Sampler` as the harness asks for it. `backend` and the other public names are the harness's.

    Args:
        source: what `open_model` opens, or a model that is open.
        dtype: "bf16" or "fp32". device: as torch spells it. None: as `open_model` chooses.

    The harness's batch sizes are taken and have no meaning: what fits is packed.
    """

    def __init__(
        self,
        source: str | Path | Sampler,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        advance: Advance = silent,
    ) -> None:
        super().__init__()
        if not isinstance(source, Sampler):
            if dtype not in (None, *DTYPES):
                raise ConfigError(f"dtype={dtype} is neither {' nor '.join(DTYPES)}")
            place = torch.device(device) if device is not None else None
            source = Sampler(open_model(Path(source), place, DTYPES[dtype] if dtype else None))
        self.sampler, self.opened = source, source.opened
        self.advance = advance
        self._device = self.opened.device
        self._texts = Texts(source.opened)
        self._chat: Chat | None = None

    @property
    def eot_token_id(self) -> int:
        return self.opened.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self._texts.first

    @property
    def max_length(self) -> int:
        return self.opened.cfg.max_seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """What a chat template wrote has its own special tokens."""
        begun = self._chat is None if add_special_tokens is None else add_special_tokens
        return text_ids(self.opened.tokenizer, self._texts.bos if begun else None, string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        scores = Scorer(self.opened).score(pairs, self.advance)
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append(Pair(tuple(context), tuple(continuation)))
                owners.append(number)
        found = [0.0] * len(requests)
        for owner, score in zip(owners, Scorer(self.opened).score(pairs, self.advance), strict=True):
            found[owner] += score.logprob
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prepared = []
        for request in requests:
            text, settings = request.args
            sampling = sampling_of(settings)
            asked = self.sampler.prompts.continued(self.tok_encode(text), sampling)
            prepared.append(cut_to_fit(asked, self.max_length)[0])
        completions = complete(self.sampler, prepared, self.advance)
        return [
            self.sampler.text(each, request.sampling, request.prompt)
            for each, request in zip(completions, prepared, strict=True)
        ]

    @property
    def tokenizer_name(self) -> str:
        return tokenizer_hash(self.opened.tokenizer_dir)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Asked for once, before the first chat."""
        if not chat_template:
            return None
        self._chat = Chat(self.opened.tokenizer_dir)
        return chat_templates(self.opened.tokenizer_dir).get("default")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self._chat is None:
            self._chat = Chat(self.opened.tokenizer_dir)
        return self._chat.render(chat_history, add_generation_prompt=add_generation_prompt)


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """A task's `generation_kwargs`: greedy unless it says do_sample.

    Raises:
        ConfigError: a setting that the sampler has not.
    """
    given = dict(settings)
    until = given.pop("until", None) or []
    tokens = next(
        (given.pop(key) for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in given),
        MAX_TOKENS,
    )
    if not given.pop("do_sample", bool(given.get("temperature"))):
        given["temperature"] = 0.0
    known: dict[str, Any] = {
        key: given.pop(key) for key in ("temperature", "top_k", "top_p", "min_p", "seed") if key in given
    }
    if given:
        raise ConfigError(f"the task's generation_kwargs have {', '.join(given)}, which the sampler has not")
    stop = (until,) if isinstance(until, str) else tuple(until)
    settings = {"max_tokens": int(tokens), "temperature": 1.0, "stop": stop, **known}
    return Sampling(**settings)


def run_harness(
    sampler: Sampler,
    names: list[str],
    *,
    shots: int | None,
    limit: int | None,
    chat: bool,
    seed: int,
    advance: Advance = silent,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Numbers by task, as `tasks.run_task` gives them, and a row for every question.

    Args:
        names: of the harness's tasks, groups and tags, or paths of a task's YAML file. shots: None: a task's own.

    Raises:
        ConfigError: there is no such task. DrivetrainError: the harness fails, for want of a data set for example.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Its own tasks are thousands of files, which take it ten seconds to list.
    manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in names))
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise ConfigError(
                f"{HARNESS}{name} is none of the harness's tasks and no file; `lm_eval ls tasks` lists them"
            )
    try:
        found = simple_evaluate(
            model=DrivetrainLM(sampler, advance=advance),
            tasks=names,
            num_fewshot=shots,
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            bootstrap_iters=1000,
            fewshot_random_seed=seed,
        )
    except DrivetrainError:
        raise
    except Exception as error:  # datasets', the hub's and the harness's own have no common ground
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DrivetrainError(f"lm_eval cannot run {', '.join(names)}: {reason}") from error
    results = {
        f"{HARNESS}{name}": {
            "kind": "lm_eval",
            "questions": found["n-samples"].get(name, {}).get("effective"),
            "shots": found["n-shot"].get(name),
            "chat": chat,
            "metrics": _metrics(numbers),
        }
        for name, numbers in found["results"].items()
    }
    rows = [
        {"task": f"{HARNESS}{name}", **_row(sample)}
        for name, samples in found["samples"].items()
        for sample in samples
    ]
    return results, rows


def _metrics(numbers: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`acc,none` and `acc_stderr,none` become `acc`; a filter other than none stays in the name."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in numbers.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        found[name] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return found


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in ("doc_id", "doc", "target", "filtered_resps") if key in sample}
