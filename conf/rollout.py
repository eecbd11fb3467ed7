"""Who completes the prompts of a rollout: `stage.rollout`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

RENDEZVOUS = 1800  # seconds that ranks wait for each other (train/mesh.py)


class RolloutEngine(Enum):
    """The built-in sampler, vLLM in the ranks' processes, a vLLM server that is sent the weights, or any server of
    OpenAI's API, whose model stays as it is."""

    builtin = "builtin"
    vllm = "vllm"
    vllm_server = "vllm_server"
    endpoint = "endpoint"


@dataclass(kw_only=True, slots=True)
class VllmConfig:
    """vLLM beside the trainer on its GPU."""

    memory: float = 0.3  # share of the GPU, for weights, keys and values
    eager: bool = False  # no CUDA graphs


@dataclass(kw_only=True, slots=True)
class ServerConfig:
    """For engine=vllm_server and endpoint. Rank r asks the urls' number r modulo their count."""

    urls: list[str] = field(default_factory=lambda: ["http://127.0.0.1:8000/v1"])
    model: str = ""  # the name that the servers know it by
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key; it may be unset
    concurrent: int = 64  # requests of a rank that are under way at once
    token_ids: bool = (
        True  # the server returns token ids (vLLM's return_token_ids); false: text, tokenised once
    )
    weights: str | None = (
        None  # vllm_server: directory that trainer and servers share; default RUN_DIR/rollout
    )


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    engine: RolloutEngine = RolloutEngine.builtin
    copy: bool = (
        False  # builtin: a whole copy of the weights on each rank to sample from, in place of shared ones
    )
    max_staleness: int = (
        0  # updates that prompts may be sampled ahead of; 0: sampling and training take turns
    )
    timeout_seconds: float = 600.0  # for one request, one step of an environment, one scoring
    retries: int = 1  # of what fails or takes longer; then it is dropped
    kv_tokens: int = (
        0  # copy: tokens of keys and values that a rank holds; 0: half of the memory that is free
    )
    server: ServerConfig = field(default_factory=ServerConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def collective(self) -> bool:
        """Whether the ranks sample together, from the weights that they share."""
        return self.engine is RolloutEngine.builtin and not self.own_weights

    @property
    def own_weights(self) -> bool:
        """Whether the built-in sampler has a copy of the weights in each rank."""
        return self.engine is RolloutEngine.builtin and (self.copy or self.max_staleness > 0)


def rollout_problems(cfg: RolloutConfig, updates: int) -> Iterator[str]:
    """One sentence for every problem.

    Args:
        updates: steps that share out one rollout.
    """
    here = "stage.rollout"
    served = cfg.engine in (RolloutEngine.vllm_server, RolloutEngine.endpoint)
    if cfg.max_staleness and updates > 1:
        yield (
            f"{here}.max_staleness={cfg.max_staleness} lets sampling run ahead of every step, and "
            f"stage.updates={updates} has steps share a rollout; use stage.updates=1"
        )
    if cfg.max_staleness and cfg.engine is RolloutEngine.vllm:
        yield (
            f"{here}.engine=vllm takes turns with training on one GPU and cannot run ahead of it; use "
            f"{here}.engine=vllm_server, or {here}.max_staleness=0"
        )
    if cfg.copy and cfg.engine is not RolloutEngine.builtin:
        yield f"{here}.copy=true is for {here}.engine=builtin, and this is {cfg.engine.value}; leave it out"
    if cfg.timeout_seconds * (cfg.retries + 1) >= RENDEZVOUS and cfg.collective:
        yield (
            f"{here}.timeout_seconds={cfg.timeout_seconds:g} with {here}.retries={cfg.retries} is longer than the "
            f"{RENDEZVOUS} s that ranks wait for each other; use less"
        )
    if served and not cfg.server.model:
        yield f"{here}.server.model is empty; give the name that the server at {here}.server.urls knows"
    if served and not cfg.server.urls:
        yield f"{here}.server.urls is empty; give at least one, as in [http://127.0.0.1:8000/v1]"
    if cfg.engine is RolloutEngine.vllm_server and not cfg.server.token_ids:
        yield (
            f"{here}.server.token_ids=false would train on tokens that the sampler may not have drawn; leave it "
            f"out with {here}.engine=vllm_server"
        )
