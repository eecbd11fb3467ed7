"""vLLM in the rank's own process, on the GPU that trains: written to its documentation, and not tried yet."""

import math
import os
from pathlib import Path
from typing import Any

import torch

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.rollout import VllmConfig
from drivetrain.conf.schema import ModelConfig
from drivetrain.model.generate import Completion, Request
from drivetrain.train.engine.base import Engine
from drivetrain.train.rl.samplers.batching import Batching
from drivetrain.train.rl.samplers.send import hf_weights


class Vllm(Batching):
    """A whole copy of the weights in vLLM's kernels, given anew after each update.

    Args:
        folder: with the model's config.json. tokenizer: with its files. ends: tokens that end a completion.
        seq_len: tokens that a prompt and its completion have at most.

    Raises:
        ConfigError: there is no GPU, or vLLM is not installed.
    """

    def __init__(
        self,
        cfg: VllmConfig,
        folder: Path,
        tokenizer: Path,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        ends: list[int],
        seq_len: int,
        seconds: float,
    ) -> None:
        super().__init__(seconds)
        if device.type != "cuda":
            raise ConfigError("stage.rollout.engine=vllm needs a GPU; use stage.rollout.engine=builtin")
        # In this process, so that weights are passed as tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                "stage.rollout.engine=vllm needs vLLM; run `pip install 'drivetrain[vllm]'`"
            ) from error
        self.model, self.dtype, self.device, self.ends = model, dtype, device, ends
        self.llm = LLM(
            model=str(folder),
            tokenizer=str(tokenizer),
            dtype=str(dtype).removeprefix("torch."),
            load_format="dummy",
            distributed_executor_backend="external_launcher",  # the ranks exist already
            tensor_parallel_size=1,
            gpu_memory_utilization=cfg.memory,
            enforce_eager=cfg.eager,
            max_model_len=min(seq_len, model.max_seq_len),
            logprobs_mode="processed_logprobs",  # of the distribution that is drawn from
            generation_config="vllm",  # no defaults of the model's own
        )
        self._submitted = 0
        self._filtered: set[int] = set()  # requests that are drawn with a filter

    def _enter(self) -> None:
        torch.cuda.set_device(self.device)

    def _submit(self, request: Request) -> int:
        from vllm import SamplingParams

        sampling = request.sampling
        params = SamplingParams(
            n=request.samples,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop=list(sampling.stop),
            stop_token_ids=[*self.ends, *sampling.stop_tokens],
            logprobs=0,  # of the token that was drawn alone
        )
        self._submitted += 1
        if sampling.filters:
            self._filtered.add(self._submitted)
        self.llm.llm_engine.add_request(
            str(self._submitted), {"prompt_token_ids": list(request.prompt)}, params
        )
        return self._submitted

    def _step(self) -> list[tuple[int, list[Completion]]]:
        done = [output for output in self.llm.llm_engine.step() if output.finished]
        found = []
        for output in done:
            number = int(output.request_id)
            found.append((number, [self._taken(one, number) for one in output.outputs]))
            self._filtered.discard(number)
        return found

    def _taken(self, one: Any, request: int) -> Completion:
        tokens = list(one.token_ids)
        logprobs = [place[token].logprob for place, token in zip(one.logprobs, tokens, strict=True)]
        reason = "stop" if one.finish_reason == "stop" else "length"
        kept = [math.nan] * len(tokens) if request in self._filtered else []  # vLLM does not tell it
        versions = [self.version] * len(tokens)
        return Completion(tokens, logprobs, list(logprobs), reason, versions, kept)  # type: ignore[arg-type]

    def _cancel(self, request: int) -> None:
        self.llm.llm_engine.abort_request([str(request)])
        self._filtered.discard(request)

    def _take_weights(self, engine: Engine, version: int) -> None:
        weights = hf_weights(engine, self.model, self.dtype)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()  # keys and values of the old weights
        torch.cuda.synchronize(self.device)
