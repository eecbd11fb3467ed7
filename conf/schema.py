"""What a run is: one tree of typed dataclasses.

Hydra composes YAML from the groups beside this file into a `RunConfig`; `OmegaConf.to_object` turns it into
these classes once, and code receives the smallest part it needs. Slots make a mistyped key an error, and
enums (not `Literal`, which OmegaConf below 2.4 refuses) make a mistyped value one.
"""

import importlib.resources
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from drivetrain.conf.rewards import RewardsConfig


class Precision(Enum):
    """Arithmetic of the forward and backward pass. Master weights and moments are always fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class Checkpointing(Enum):
    """Activation checkpointing: keep everything, recompute whole blocks, or keep matmul outputs only."""

    none = "none"
    block = "block"
    selective = "selective"


class Schedule(Enum):
    """Learning-rate shape after the linear warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


class Kernels(Enum):
    """Which implementation the model's operations use: ours in Triton, PyTorch's own, flash-attn's attention among
    our other ones, or the plain definitions. `auto` is triton on GPUs that can run it, else sdpa."""

    auto = "auto"
    triton = "triton"
    sdpa = "sdpa"
    flash_attn = "flash_attn"
    reference = "reference"


class Norm(Enum):
    """RMSNorm, or LayerNorm with a bias."""

    rms = "rms"
    layer = "layer"


class Mlp(Enum):
    """down(silu(gate) · up), or down(gelu(up)) with GELU's tanh approximation."""

    swiglu = "swiglu"
    gelu = "gelu"


class Positions(Enum):
    """Rotated queries and keys, or a learned vector for each of `max_seq_len` positions."""

    rope = "rope"
    learned = "learned"


class TooLong(Enum):
    """What becomes of conversations longer than a row: they are left out, or their beginning is taken."""

    drop = "drop"
    truncate = "truncate"


class Variant(Enum):
    """Which objective of reinforcement learning; docs/grpo.md has each one's formula and paper."""

    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    gspo = "gspo"
    cispo = "cispo"
    rloo = "rloo"
    reinforce_pp = "reinforce_pp"


class KlEstimator(Enum):
    """Of KL(policy || reference) from one token: log ratio, half its square, or the one that is never negative."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KlIn(Enum):
    """Where kl_coef times the divergence goes."""

    loss = "loss"
    reward = "reward"


class Importance(Enum):
    """What corrects the gap between the sampler's log-probabilities and the trainer's: nothing, truncated weights
    of the tokens, or of whole completions."""

    off = "off"
    token = "token"
    sequence = "sequence"


class PreferenceLoss(Enum):
    """What is learned from pairs: by comparison with a reference model (DPO, IPO), or without one (SimPO)."""

    dpo = "dpo"
    ipo = "ipo"
    simpo = "simpo"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WandbMode(Enum):
    """`auto` is online where there is a key and the server answers, and offline otherwise."""

    auto = "auto"
    online = "online"
    offline = "offline"


@dataclass(kw_only=True, slots=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (Llama 3 report, section 3.2; `rope_type: llama3` in transformers)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; with LayerNorm, learned positions, GELU
    and all biases it is GPT-2."""

    name: str = MISSING
    vocab_size: int = MISSING
    dim: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING
    head_dim: int = MISSING
    ffn_dim: int = MISSING
    max_seq_len: int = MISSING
    positions: Positions = Positions.rope
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    nope_every: int = 0  # every n-th layer does without RoPE (SmolLM3: 4); 0: none
    norm: Norm = Norm.rms
    norm_eps: float = 1e-5
    mlp: Mlp = Mlp.swiglu
    qk_norm: bool = False  # RMSNorm over head_dim of q and k before RoPE (Qwen3)
    qkv_bias: bool = False  # Qwen2
    out_bias: bool = False  # with qkv_bias: transformers' `attention_bias` for Llama
    mlp_bias: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None  # a token attends to itself and the window-1 before it (Mistral)
    init_std: float = 0.02
    init_from: str | None = None  # a run, a checkpoint or a Hugging Face directory to start from


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What every stage has. Lengths are in tokens, intervals in optimizer steps (0: never)."""

    name: str = MISSING
    steps: int = MISSING
    seq_len: int = MISSING
    tokens_per_step: int = MISSING  # over all ranks; a multiple of seq_len
    micro_batch: Any = "auto"  # sequences a rank puts through the model at once; auto: as many as fit
    eval_every: int = 0
    eval_tokens: int = 131072  # held-out tokens an evaluation reads
    save_every: int = 0
    log_every: int = 1  # at least 1: a run without metrics has no summary
    sample_prompts: list[str] = field(default_factory=list)  # continued at each evaluation
    sample_tokens: int = 48


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    z_loss: float = 0.0  # weight of logsumexp(logits)^2 (PaLM, section 5)


@dataclass(kw_only=True, slots=True)
class SftConfig(StageConfig):
    """Conversations packed into rows of seq_len. `sample_prompts` are what a user says, answered as in a chat."""

    too_long: TooLong = TooLong.drop


@dataclass(kw_only=True, slots=True)
class GrpoConfig(StageConfig):
    """Reinforcement learning on problems whose answers can be checked. A rollout, `group_size` completions of each
    of its prompts, is sampled by the model itself; `seq_len` is the length of a packed row, and `tokens_per_step`
    what a step has at most."""

    tokens_per_step: int = 0  # follows from the numbers below
    environment: str = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    prompts_per_step: int = MISSING
    group_size: int = MISSING  # completions of one prompt
    max_completion: int = MISSING  # tokens
    rewards: RewardsConfig = field(default_factory=RewardsConfig)  # added to the environment's own
    environment_weight: float = 1.0  # of the environment's own reward
    variant: Variant = Variant.grpo
    updates: int = 1  # steps that share out one rollout
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    clip_low: float = 0.2  # the ratio's lower bound is 1 less this
    clip_high: float = 0.2  # and its upper bound 1 plus this
    dynamic_sampling: bool = False  # other prompts in place of groups whose rewards are all equal (DAPO)
    max_tries: int = 3  # rounds of sampling for one rollout, the first included
    kl_coef: float = 0.0  # 0: no reference model
    kl_estimator: KlEstimator = KlEstimator.k3
    kl_in: KlIn = KlIn.loss
    entropy_coef: float = 0.0
    importance: Importance = Importance.token
    importance_cap: float = 2.0
    eval_problems: int = 100  # held-out ones, answered greedily
    eval_unseen: bool = (
        True  # no question is both held out and trained on; false: they differ in their seeds alone
    )
    eval_samples: int = 0  # answers to each that are drawn besides, for pass@k; 0: none

    def __post_init__(self) -> None:
        most = self.prompts_per_step * self.group_size * self.seq_len
        if self.tokens_per_step not in (0, most):
            raise ValueError(
                f"stage.tokens_per_step={self.tokens_per_step} follows from prompts_per_step, group_size and "
                "seq_len and cannot be given; leave it out"
            )
        self.tokens_per_step = most


@dataclass(kw_only=True, slots=True)
class DpoConfig(StageConfig):
    """Preference pairs, packed into rows of seq_len; the reference is the model that training begins with.
    `sample_prompts` are what a user says, answered as in a chat."""

    loss: PreferenceLoss = PreferenceLoss.dpo
    beta: float = 0.1  # simpo: 2.0 to 2.5 in the paper
    margin: float = 0.5  # simpo alone: what the chosen answer must win by, γ in the paper
    label_smoothing: float = 0.0  # dpo and simpo: the share of pairs that are taken to be the wrong way round


@dataclass(kw_only=True, slots=True)
class RewardModelConfig(StageConfig):
    """Preference pairs, packed into rows of seq_len, for a model whose head gives one number in place of logits."""


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    name: str = MISSING
    precision: Precision = Precision.bf16
    checkpointing: Checkpointing = Checkpointing.none
    compile: bool = False  # torch.compile, block by block
    replicas: int = 1  # HSDP: groups that hold a whole copy; ranks must be a multiple


@dataclass(kw_only=True, slots=True)
class FsdpConfig(EngineConfig):
    reshard_after_forward: bool = True


@dataclass(kw_only=True, slots=True)
class ZeroConfig(EngineConfig):
    zero_stage: int = 2
    offload: bool = False  # optimizer state and its step on the CPU


ALL_LINEAR = "all-linear"  # PEFT's word for every matrix of the blocks


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters on frozen weights (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank · B A."""

    rank: int = 0  # 0: off, every weight is trained
    alpha: float = 32.0
    dropout: float = 0.0  # of what goes into the adapters
    targets: list[str] = field(
        default_factory=lambda: [ALL_LINEAR]
    )  # or q_proj, gate_proj ... as in transformers
    init_from: str | None = None  # a directory with an adapter in PEFT's format to start from


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of a mixture: a directory that `drivetrain data build` made, and its share."""

    path: str = MISSING
    weight: float = 1.0


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: str | None = None
    mixture: dict[str, SourceConfig] = field(default_factory=dict)
    prefetch: int = 2  # steps read ahead in the background


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    name: str = MISSING
    lr: float = MISSING
    warmup_steps: int = 0
    schedule: Schedule = Schedule.cosine
    min_lr_ratio: float = 0.1  # of lr, reached at the last step
    decay_ratio: float = 0.2  # of all steps, for schedule=wsd
    weight_decay: float = 0.1  # matrices only; norms and biases have none
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # global L2 norm; 0 turns clipping off


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimConfig):
    pass


@dataclass(kw_only=True, slots=True)
class MuonConfig(OptimConfig):
    """Muon for the blocks' matrices, AdamW (the keys above) for embeddings, head, norms and biases."""

    matrix_lr: float = 0.02
    momentum: float = 0.95
    ns_steps: int = 5


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    name: str = MISSING
    nodes: int = 1
    nproc: int = 1  # ranks a node
    device: Device = Device.auto
    dry_run: bool = False
    omp_threads: int = 0  # threads a rank on the CPU; 0 shares the cores out evenly


@dataclass(kw_only=True, slots=True)
class TorchrunConfig(ClusterConfig):
    """Make the run directory and print the command that starts it on every node."""

    host: str = "localhost"  # the first node, as the others reach it
    port: int = 29500


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    name: str = MISSING


@dataclass(kw_only=True, slots=True)
class WandbConfig(TrackerConfig):
    project: str = "drivetrain"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: WandbMode = WandbMode.auto


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    keep_last: int = 2
    keep_every: int = 0  # also keep every checkpoint whose step is a multiple
    asynchronous: bool = True


@dataclass(kw_only=True, slots=True)
class AlarmConfig:
    """When to speak up. A loss spike is a loss above `spike_factor` times the median of the last `window`."""

    spike_factor: float = 1.5
    window: int = 50
    max_skipped: int = 10  # steps in a row skipped for non-finite gradients before the run fails; 0: no limit


@dataclass(kw_only=True, slots=True)
class RunConfig:
    run_dir: str | None = None  # default runs/<experiment>/<time>
    seed: int = 0
    kernels: Kernels = Kernels.auto
    tokenizer: str | None = None  # default: the one that the data was built with
    objective: str = "eval/loss"  # the number a sweep minimises; falls back to loss
    model: ModelConfig = MISSING
    stage: StageConfig = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    engine: EngineConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = MISSING
    cluster: ClusterConfig = MISSING
    tracker: TrackerConfig = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    experiment: str | None = None  # the preset that was chosen


# Which class a group's option has. Each option's YAML begins with its schema, so an unknown key is refused.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"decoder": ModelConfig},
    "stage": {
        "pretrain": PretrainConfig,
        "sft": SftConfig,
        "grpo": GrpoConfig,
        "dpo": DpoConfig,
        "reward_model": RewardModelConfig,
    },
    "engine": {"fsdp": FsdpConfig, "zero": ZeroConfig},
    "data": {"shards": DataConfig},
    "optim": {"adamw": AdamWConfig, "muon": MuonConfig},
    "cluster": {"local": ClusterConfig, "torchrun": TorchrunConfig},
    "tracker": {"none": TrackerConfig, "wandb": WandbConfig, "tensorboard": TrackerConfig},
}


def options(group: str) -> list[str]:
    """Names of a group's options, sorted: the YAML files in its folder."""
    folder = importlib.resources.files("drivetrain.conf") / group
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )
