"""What a rank holds in memory, by part and by moment of a training step, without torch and without a GPU.

P parameters · n ranks that share them · D width · N query heads · K key/value heads · H head dim · F hidden
width of the MLP · V vocabulary · T = micro_batch · seq_len packed tokens · S seq_len · e bytes of a number in
the forward pass, 2 in bf16 and 4 in fp32.

The parts that follow from the parameters were compared with the engines on two CPU ranks, and the activations
with what the model keeps on a CPU; neither has been compared with measured peaks of a GPU yet.
"""

from dataclasses import dataclass
from pathlib import Path

from drivetrain.conf.head_dim import triton_takes
from drivetrain.conf.lora import adapters_of
from drivetrain.conf.schema import (
    Checkpointing,
    Device,
    GrpoConfig,
    Kernels,
    ModelConfig,
    Norm,
    Positions,
    RunConfig,
)
from drivetrain.conf.source import model_of
from drivetrain.kernels.chunks import CHUNK_TOKENS, TILE_ELEMENTS, chunk_tokens
from drivetrain.model.flops import parameter_count, up_rows
from drivetrain.model.memory_engines import element_bytes, engine_state, start_bytes

# A step's peaks: all activations and a chunk of logits; the last block's backward pass; the first block's, with
# all gradients; the update.
MOMENTS = ("loss", "backward_begins", "backward_ends", "update")
START = "start"  # before them, where an engine then holds what it does not hold in a step
PARTS = ("weights", "optimizer", "gradients", "buffers", "activations", "working_set")

USABLE = 0.9  # the rest: CUDA context, NCCL's buffers, and what the allocator cannot use


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank: `by_moment[moment][part]`, of `START` too with engine=zero,
    and `host` in the CPU's memory for offloaded state."""

    by_moment: dict[str, dict[str, int]]
    host: int = 0

    def total(self, moment: str) -> int:
        return sum(self.by_moment[moment].values())

    @property
    def peak_moment(self) -> str:
        return max(self.by_moment, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_moment)


def sequences_per_rank(config: RunConfig) -> int:
    """Sequences of a step that each rank works on."""
    ranks = config.cluster.nodes * config.cluster.nproc
    return config.stage.tokens_per_step // config.stage.seq_len // ranks


def estimate(config: RunConfig, micro_batch: int, device: Device | None = None) -> Memory:
    """The memory plan of one rank.

    Args:
        micro_batch: sequences that go through the model at once.
        device: cpu or cuda; by default the configured one, auto meaning cuda. A CPU keeps more of each norm.
    """
    model = config.model
    on_cpu = (device or config.cluster.device) is Device.cpu
    tokens = micro_batch * config.stage.seq_len
    accumulates = micro_batch < sequences_per_rank(config)
    state = engine_state(config, accumulates)
    blocks, working = block_activations(config, tokens, on_cpu)
    # cos and sin in fp32; tokens, targets, positions and weights; who sees whom.
    angles = 4 * model.head_dim if model.positions is Positions.rope else 0
    shared = tokens * (angles + 20 + _view(config, on_cpu))
    ends, loss = _head(config, tokens, on_cpu)
    kept = shared + model.layers * blocks + adapter_activations(config, tokens)
    activations = (kept + ends, kept, shared + blocks, 0)
    working_sets = (loss, working, working, 0)
    table = {}
    weights = state.weights + _beside(config, on_cpu)
    for index, moment in enumerate(MOMENTS):
        gradients, buffers = state.moments[index]
        values = (
            weights,
            state.optimizer,
            gradients,
            buffers,
            activations[index],
            working_sets[index],
        )
        table[moment] = {part: int(value) for part, value in zip(PARTS, values, strict=True)}
    if start := start_bytes(config):
        table[START] = dict.fromkeys(PARTS, 0) | {"weights": start}
    return Memory(by_moment=table, host=int(state.host))


def choose_micro_batch(config: RunConfig, memory_bytes: float, device: Device | None = None) -> int:
    """The largest divisor of the sequences per rank whose plan fits into `USABLE` of the memory; at least 1."""
    share = sequences_per_rank(config)
    for size in range(share, 1, -1):
        if share % size == 0 and estimate(config, size, device).peak <= USABLE * memory_bytes:
            return size
    return 1


def block_activations(config: RunConfig, tokens: int, on_cpu: bool = False) -> tuple[int, int]:
    """What one block keeps for its backward pass, and what that pass needs besides.

    Kept a token, in numbers of e bytes unless said otherwise, with checkpointing=none:

        D         input of the first norm            D          input of the second norm
        D         its output, input of wqkv          D          its output, input of w_gate_up
        (N+2K)H   query, key and value (for value)   2F         gate and up
        (N+K)H    query and key after RoPE           F          silu(gate)
        NH        output of attention                F          silu(gate)·up, input of w_down
        4N bytes  logsumexp of attention             8 bytes    1/rms of both norms
        4(N+K) bytes more with norms of query and key, for 1/rms

    GPT-2's block keeps no turned query and key, 2F in its MLP (up, gelu(up)), and 8 bytes more for means.

    No scores: the attention kernel is assumed to be a fused one. checkpointing=block keeps the D of the input
    and computes the rest again; selective keeps D, the outputs of the matmuls (wqkv, wo, gate and up, w_down)
    and of attention. The backward pass of a block begins with D + 3F of gradients (GPT-2: D + 2F). On a CPU,
    RMSNorms are not fused and keep their input and their normalised output in fp32. torch.compile keeps less than
    all this.

    Args:
        tokens: T.

    Returns:
        Bytes.
    """
    model = config.model
    e = element_bytes(config.engine.precision)
    dim, ffn = model.dim, model.ffn_dim
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    softmax = 4 * model.heads
    turned = q + kv if model.positions is Positions.rope else 0
    up = up_rows(model)
    none = e * (4 * dim + 2 * q + 2 * kv + turned + 2 * up) + softmax + _norm_statistics(model, 2, e, on_cpu)
    selective = e * (3 * dim + 2 * q + 2 * kv + up) + softmax
    heads = model.heads + model.kv_heads if model.qk_norm else 0
    none += 4 * heads
    fused = not on_cpu and config.kernels is not Kernels.reference
    if not fused:
        wide = 2 * dim if model.norm is Norm.rms else 0
        none += _unfused_norm(e, wide + heads * model.head_dim) - (wide * e if e == 2 else 0)
    if config.kernels is Kernels.reference:
        # Scores of all T x T pairs: probabilities in fp32 and the boolean mask; q, k and v widened to N heads.
        none += 5 * model.heads * tokens + tokens + 12 * q
    begins = e * (dim + up + ffn)
    match config.engine.checkpointing:
        case Checkpointing.none:
            kept, working = none, begins
        case Checkpointing.block:
            kept, working = e * dim, none - e * dim + begins
        case Checkpointing.selective:
            kept, working = selective, none - (selective - 2 * e * dim) + begins
    return tokens * kept, tokens * working


def adapter_activations(config: RunConfig, tokens: int) -> int:
    """Bytes that all adapters keep beside their frozen matrices.

    x Aᵀ of each, and with dropout what is left of each matrix's input, and which of it; with
    checkpointing=selective the outputs of both products, which are matmuls. With checkpointing=block they keep
    nothing, and what they need in a block's backward pass is left out.
    """
    specs, lora = adapters_of(config.model, config.lora), config.lora
    e, policy = element_bytes(config.engine.precision), config.engine.checkpointing
    if policy is Checkpointing.block:
        return 0
    kept = sum(e * lora.rank + (e * spec.rows if policy is Checkpointing.selective else 0) for spec in specs)
    if lora.dropout:
        columns = {spec.module: spec.columns for spec in specs}
        kept += (e + 1) * sum(columns.values())
    return tokens * kept


def _fused(config: RunConfig, on_cpu: bool) -> bool:
    """Whether Triton's kernels run; `auto` means them on a GPU (model/backend.py), flash_attn those but one."""
    if config.kernels is Kernels.auto:
        return not on_cpu and triton_takes(config.model.head_dim, config.engine.precision)
    return config.kernels in (Kernels.triton, Kernels.flash_attn)


def _view(config: RunConfig, on_cpu: bool) -> int:
    """Bytes a token of what attention is told about the documents (kernels/attention.py)."""
    if config.kernels in (Kernels.reference, Kernels.flash_attn):
        return 0
    if _fused(config, on_cpu):
        return 16  # four int32
    # sdpa: a mask of S entries, boolean and as a bias.
    return (1 + element_bytes(config.engine.precision)) * config.stage.seq_len


def _norm_statistics(model: ModelConfig, norms: int, e: int, on_cpu: bool) -> int:
    """Bytes a token: 1/rms of each norm in fp32; of a LayerNorm its mean too, on a CPU in the input's dtype."""
    if model.norm is Norm.rms:
        return 4 * norms
    return 2 * norms * (e if on_cpu else 4)


def _unfused_norm(e: int, width: int) -> int:
    """Bytes a token that a norm of `width` keeps beside a fused one's: its normalised output in fp32, and a
    widened copy of its input where that is not fp32 already."""
    return 4 * width + (4 * width if e == 2 else 0)


def _head(config: RunConfig, tokens: int, on_cpu: bool) -> tuple[int, int]:
    """Bytes kept between the last block and the loss, and the loss's working set.

    The last norm's input and output are kept, and the gradient of the output is written in the forward pass.
    The chunked loss holds C x V logits and the gradient of the head (V x D), in fp32 where there are several
    chunks. In plain PyTorch in bf16 also an fp32 copy of the logits that go through the softmax together, on a
    CPU a tile of them and else all, and one chunk's part of the head's gradient; with Triton's kernels that
    gradient once more in bf16, when the logits are gone. The reference holds all T x V logits three times.
    """
    model, e = config.model, element_bytes(config.engine.precision)
    dim, vocab = model.dim, model.vocab_size
    # A frozen head has no gradient.
    table, narrow = (0 if config.lora.rank else vocab * dim), e == 2
    ends = tokens * (2 * e * dim + _norm_statistics(model, 1, e, on_cpu))
    if (on_cpu or config.kernels is Kernels.reference) and model.norm is Norm.rms:
        ends += tokens * _unfused_norm(e, dim)
    if config.kernels is Kernels.reference:
        return ends, tokens * vocab * 12
    if _fused(config, on_cpu):
        size = chunk_tokens(tokens, vocab, dim, e)
        several = tokens > size
        logits, gradient = e * min(size, tokens) * vocab, (4 if several else e) * table
        loss = gradient + max(logits, e * table if several and narrow else 0)
    else:
        chunk = min(CHUNK_TOKENS, tokens) * vocab
        widened = (max(min(chunk, TILE_ELEMENTS), dim) if on_cpu else chunk) if narrow else 0
        loss = e * chunk + 4 * widened + (4 + e * narrow) * table
    return ends, loss + tokens * e * dim


def _beside(config: RunConfig, on_cpu: bool) -> float:
    """Bytes of the models that lie beside the trained one in stage=grpo; keys and values are not counted.

    A whole copy that samples, in the dtype of the forward pass. The reference of `kl_coef` (train/build.py): fp32
    shards over all ranks, replicas or not, and what stays gathered of it, all outside the blocks. A reward model
    (train/rl/reward_model_reward.py): whole, in bf16 on a GPU and fp32 on a CPU.
    """
    stage, cluster = config.stage, config.cluster
    if not isinstance(stage, GrpoConfig):
        return 0
    e, count = element_bytes(config.engine.precision), parameter_count(config.model)
    found: float = e * count.total if stage.rollout.own_weights else 0
    if stage.kl_coef:
        found += 4 * count.total / (cluster.nodes * cluster.nproc) + e * count.outside_blocks
    judge = stage.rewards.reward_model
    if judge.weight and judge.run is not None:
        found += (4 if on_cpu else 2) * parameter_count(model_of(Path(judge.run))).total
    return found
