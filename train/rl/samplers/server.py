"""Servers of OpenAI's API as samplers: vLLM's, which are sent the weights, and any whose model stays as it is.

A request is a prompt of token ids to `/v1/completions`, and an answer is taken by token ids where the server gives
them (vLLM's `return_token_ids`), else its text is tokenised, once. Log-probabilities that are not those of the
distribution which was drawn from are not taken: NaN stands for them, and the trainer puts its own in their place.
"""

import asyncio
import math
import os
import random
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.rollout import ServerConfig
from drivetrain.conf.schema import ModelConfig
from drivetrain.model.draw import Sampling
from drivetrain.model.generate import Completion, Request
from drivetrain.train.engine.base import Engine
from drivetrain.train.mesh import World
from drivetrain.train.rl.guard import Warnings
from drivetrain.train.rl.samplers.base import Completions
from drivetrain.train.rl.samplers.send import write_weights

UNKNOWN = math.nan  # a log-probability that nobody told
PASSING = (408, 409, 425, 429)  # and from 500 on: another try may help
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between two tries, doubled each time


class Server:
    """A `Completer` for calls from many threads, whose model is frozen.

    Args:
        ends: tokens that end a completion; the last of them is put behind a text that came to its end.
        seconds: for one request. retries: of one that fails.

    Raises:
        ConfigError: openai's client is not installed.
    """

    collective = follows = False

    def __init__(
        self,
        cfg: ServerConfig,
        tokenizer: Tokenizer,
        ends: Sequence[int],
        rank: int,
        seconds: float,
        retries: int,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "stage.rollout.engine needs openai's client; run `pip install 'drivetrain[rl]'`"
            ) from error
        self.cfg, self.tokenizer, self.ends = cfg, tokenizer, list(ends)
        self.url = cfg.urls[rank % len(cfg.urls)]
        self.seconds, self.retries, self.version = seconds, retries, 0
        self.warnings = Warnings()
        self._room = asyncio.Semaphore(cfg.concurrent)
        key = os.environ.get(cfg.key_variable) or "none"
        self._client = openai.AsyncOpenAI(base_url=self.url, api_key=key, timeout=seconds, max_retries=0)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="requests", daemon=True).start()

    def generate(self, requests: Sequence[Request]) -> Completions:
        return asyncio.run_coroutine_threadsafe(self._all(requests), self._loop).result()

    def sync(self, engine: Engine, version: int) -> None:
        self.version = version

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _all(self, requests: Sequence[Request]) -> Completions:
        return list(await asyncio.gather(*map(self._one, requests)))

    async def _one(self, request: Request) -> list[Completion | None]:
        pause = FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            async with self._room:
                try:
                    return await self._ask(request)
                except DrivetrainError:
                    raise
                except Exception as error:
                    self.warnings.say(f"{self.url} did not complete a prompt", error)
            if left:
                await asyncio.sleep(pause * random.uniform(0.5, 1))  # they were refused together
                pause = min(2 * pause, LONGEST_PAUSE)
        return [None] * request.samples

    async def _ask(self, request: Request) -> list[Completion | None]:
        import openai

        version = self.version
        try:
            async with asyncio.timeout(self.seconds):
                answer = await self._client.completions.create(**self.body(request))
        except openai.APIStatusError as error:
            if error.status_code in PASSING or error.status_code >= 500:
                raise
            raise ConfigError(
                f"{self.url} refuses a request with status {error.status_code}: {error.message}; see stage.rollout."
                "server, of which token_ids=false leaves vLLM's own fields out"
            ) from error
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        if len(choices) != request.samples:
            raise ValueError(f"{len(choices)} completions, and {request.samples} were asked for")
        return [self._taken(choice, request.sampling, version) for choice in choices]

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent, in the client's words."""
        sampling = request.sampling
        found: dict[str, Any] = {
            "model": self.cfg.model,
            "prompt": list(request.prompt),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "n": request.samples,
            "seed": sampling.seed,
        }
        more: dict[str, Any] = {}
        if sampling.top_k:
            more["top_k"] = sampling.top_k
        if sampling.min_p:
            more["min_p"] = sampling.min_p
        if self.cfg.token_ids:
            ends = [*self.ends, *sampling.stop_tokens]
            more |= {"return_token_ids": True, "stop_token_ids": ends, "skip_special_tokens": False}
            found |= {"logprobs": 0, **({"stop": list(sampling.stop)} if sampling.stop else {})}
        elif sampling.stop or sampling.stop_tokens:
            raise ConfigError(
                "stage.rollout.server.token_ids=false does not tell which text or token ended a completion, and "
                "this environment needs to know; use a server that returns token ids"
            )
        else:
            found["stop"] = [str(self.tokenizer.id_to_token(end)) for end in self.ends]
        return found | ({"extra_body": more} if more else {})

    def _taken(self, choice: Any, sampling: Sampling, version: int) -> Completion:
        if choice.finish_reason not in ("stop", "length"):
            raise ValueError(f"a completion ended with {choice.finish_reason!r}")
        if not self.cfg.token_ids:
            tokens, cut = self._tokenised(choice, sampling)
            unknown = [UNKNOWN] * len(tokens)
            return Completion(tokens, unknown, list(unknown), "length" if cut else "stop")
        given = getattr(choice, "token_ids", None)
        if not given:
            raise ConfigError(
                f"{self.url} gives no token ids; use vLLM 0.10.2 or newer, or stage.rollout.server.token_ids=false"
            )
        tokens = list(map(int, given))
        told = choice.logprobs.token_logprobs if choice.logprobs else None
        if told is None or len(told) != len(tokens):
            told = [None] * len(tokens)
        logprobs = [UNKNOWN if each is None else float(each) for each in told]
        drawn = logprobs if self._of_what_was_drawn(sampling) else [UNKNOWN] * len(tokens)
        versions = [version] * len(tokens) if self.follows else []
        kept = [UNKNOWN] * len(tokens) if sampling.filters else []  # no server tells it
        return Completion(tokens, logprobs, drawn, choice.finish_reason, versions, kept)

    def _of_what_was_drawn(self, sampling: Sampling) -> bool:
        """Whether the server's log-probabilities are those of the distribution that was drawn from: most
        servers tell them as they are before temperature and filters."""
        return sampling.temperature == 1 and not sampling.filters

    def _tokenised(self, choice: Any, sampling: Sampling) -> tuple[list[int], bool]:
        """Tokens of a text, and whether it was cut."""
        tokens = self.tokenizer.encode(choice.text, add_special_tokens=False).ids
        if choice.finish_reason == "stop":
            tokens = [*tokens, self.ends[-1]]
        elif not tokens:
            raise ValueError("a completion is empty")
        return tokens[: sampling.max_tokens], choice.finish_reason != "stop" or len(
            tokens
        ) > sampling.max_tokens


class VllmServer(Server):
    """vLLM servers that follow the weights: rank 0 writes them to a directory that all see and has each server load
    them while what is under way waits, to go on with them.

    The servers run with VLLM_SERVER_DEV_MODE=1 and `--logprobs-mode processed_logprobs`: so their log-probabilities
    are those of what was drawn from. A completion is marked with the version that it began with.

    Args:
        folder: for the weights.
    """

    follows = True

    def __init__(
        self, *args: Any, folder: Path, model: ModelConfig, dtype: torch.dtype, world: World
    ) -> None:
        super().__init__(*args)
        self.folder, self.model_cfg, self.dtype, self.world = folder, model, dtype, world
        self._sent: Path | None = None

    def _of_what_was_drawn(self, sampling: Sampling) -> bool:
        return True

    def sync(self, engine: Engine, version: int) -> None:
        new = self.folder / f"version_{version:08}"
        write_weights(new, engine, self.model_cfg, self.dtype, self.world.is_main)
        if self.world.is_main:
            for url in self.cfg.urls:
                self._load(url.rstrip("/").removesuffix("/v1"), new)
            if self._sent not in (None, new):
                shutil.rmtree(str(self._sent), ignore_errors=True)
            self._sent = new
        self.world.barrier()
        self.version = version

    def _load(self, server: str, weights: Path) -> None:
        """https://docs.vllm.ai/en/latest/training/async_rl/ and layerwise/: pause, reload, resume."""
        self._post(f"{server}/pause?mode=keep")
        try:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.absolute())}}
            self._post(f"{server}/collective_rpc", reload)
            self._post(f"{server}/reset_prefix_cache")  # keys and values of the old weights
        finally:
            self._post(f"{server}/resume")

    def _post(self, url: str, body: dict[str, Any] | None = None) -> None:
        import httpx

        pause = FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            try:
                reply = httpx.post(url, json=body or {}, timeout=self.seconds)
                reply.raise_for_status()
                return
            except httpx.HTTPError as error:
                status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 500
                if left and (status in PASSING or status >= 500):
                    self.warnings.say(f"{url} failed and is asked again", error)
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
                raise DrivetrainError(
                    f"{url}: {error}; a vLLM server takes new weights when it was started with "
                    "VLLM_SERVER_DEV_MODE=1, and must see stage.rollout.server.weights under the same path"
                ) from error
