"""What a run is: one tree of typed dataclasses.

Hydra composes YAML from the groups beside this file into a `RunConfig`; `OmegaConf.to_object` turns it into
these classes once, and code receives the smallest part it needs. Slots make a mistyped key an error, and
enums (not `Literal`, which OmegaConf below 2.4 refuses) make a mistyped value one.
"""

import importlib.resources
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

# Every part of a run is imported from here; the stages are written in a file of their own.
from drivetrain.conf.stages import DpoConfig as DpoConfig
from drivetrain.conf.stages import GrpoConfig as GrpoConfig
from drivetrain.conf.stages import Importance as Importance
from drivetrain.conf.stages import KlEstimator as KlEstimator
from drivetrain.conf.stages import KlIn as KlIn
from drivetrain.conf.stages import PreferenceLoss as PreferenceLoss
from drivetrain.conf.stages import PretrainConfig as PretrainConfig
from drivetrain.conf.stages import RewardModelConfig as RewardModelConfig
from drivetrain.conf.stages import SftConfig as SftConfig
from drivetrain.conf.stages import StageConfig as StageConfig
from drivetrain.conf.stages import TooLong as TooLong
from drivetrain.conf.stages import Variant as Variant


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
    lr: float = MISSING  # where none is given, the stage's usual one: conf/learning_rate.py
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

    matrix_lr: float = MISSING  # as lr
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
