"""What a rank holds in memory, by part and by moment of a training step, without torch and without a GPU.

P parameters · n ranks that share them · D width · N query heads · K key/value heads · H head dim · F hidden
width of the MLP · V vocabulary · T = micro_batch · seq_len packed tokens · S seq_len · e bytes of a number in
the forward pass, 2 in bf16 and 4 in fp32.

The parts that follow from the parameters were compared with the engines on two CPU ranks, and the activations
with what the model keeps on a CPU; neither has been compared with measured peaks of a GPU yet.
"""

from dataclasses import dataclass

from drivetrain.conf.lora import adapters_of
from drivetrain.conf.schema import (
    Checkpointing,
    Device,
    FsdpConfig,
    Kernels,
    ModelConfig,
    MuonConfig,
    Norm,
    OptimConfig,
    Positions,
    Precision,
    RunConfig,
    ZeroConfig,
)
from drivetrain.kernels.chunks import CHUNK_TOKENS, TILE_ELEMENTS, chunk_tokens
from drivetrain.model.flops import ParameterCount, trained_count, up_rows

# A step's peaks: all activations and a chunk of logits; the last block's backward pass; the first block's, with
# all gradients; the update.
MOMENTS = ("loss", "backward_begins", "backward_ends", "update")
PARTS = ("weights", "optimizer", "gradients", "buffers", "activations", "working_set")

USABLE = 0.9  # the rest: CUDA context, NCCL's buffers, and what the allocator cannot use
BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size, an upper bound here
LIVE = 1_000_000_000  # elements: DeepSpeed's stage3_max_live_parameters
PREFETCH = 50_000_000  # elements: DeepSpeed's stage3_prefetch_bucket_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank: `by_moment[moment][part]`, and `host` in the CPU's memory for offloaded state."""

    by_moment: dict[str, dict[str, int]]
    host: int = 0

    def total(self, moment: str) -> int:
        return sum(self.by_moment[moment].values())

    @property
    def peak_moment(self) -> str:
        return max(MOMENTS, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_moment)


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """What an engine holds whatever the activations are; pairs of (gradients, buffers) by moment."""

    weights: float
    optimizer: float
    moments: tuple[tuple[float, float], ...]
    host: float = 0


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
    state = _engine_state(config, accumulates)
    blocks, working = block_activations(config, tokens, on_cpu)
    # cos and sin in fp32; tokens, targets, positions and weights; who sees whom.
    angles = 4 * model.head_dim if model.positions is Positions.rope else 0
    shared = tokens * (angles + 20 + _view(config, on_cpu))
    ends, loss = _head(config, tokens, on_cpu)
    kept = shared + model.layers * blocks + adapter_activations(config, tokens)
    activations = (kept + ends, kept, shared + blocks, 0)
    working_sets = (loss, working, working, 0)
    table = {}
    for index, moment in enumerate(MOMENTS):
        gradients, buffers = state.moments[index]
        values = (
            state.weights,
            state.optimizer,
            gradients,
            buffers,
            activations[index],
            working_sets[index],
        )
        table[moment] = {part: int(value) for part, value in zip(PARTS, values, strict=True)}
    return Memory(by_moment=table, host=int(state.host))


def choose_micro_batch(config: RunConfig, memory_bytes: float, device: Device | None = None) -> int:
    """The largest divisor of the sequences per rank whose plan fits into `USABLE` of the memory; at least 1."""
    share = sequences_per_rank(config)
    for size in range(share, 1, -1):
        if share % size == 0 and estimate(config, size, device).peak <= USABLE * memory_bytes:
            return size
    return 1


def moment_bytes(optim: OptimConfig, count: ParameterCount) -> int:
    """fp32 optimizer moments: two a parameter with AdamW; one for each of the blocks' matrices with Muon."""
    if isinstance(optim, MuonConfig):
        return 8 * count.total - 4 * count.block_matrices
    return 8 * count.total


def element_bytes(precision: Precision) -> int:
    return 2 if precision is Precision.bf16 else 4


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
    return config.kernels in (Kernels.triton, Kernels.flash_attn) or (
        config.kernels is Kernels.auto and not on_cpu
    )


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Numbers of parameters: all that a rank's model has, those that are trained, and those that are frozen.

    Trained ones have an fp32 master copy; frozen ones lie in the dtype of the forward pass (model/lora.py).
    """

    whole: ParameterCount
    trained: ParameterCount

    @property
    def frozen(self) -> int:
        return self.whole.total - self.trained.total


def _engine_state(config: RunConfig, accumulates: bool) -> _State:
    whole, trained = trained_count(config.model, config.lora)
    sizes = _Sizes(whole=whole, trained=trained)
    match config.engine:
        case FsdpConfig():
            return _fsdp(config, config.engine, sizes, accumulates)
        case ZeroConfig(zero_stage=0):
            return _zero_0(config, sizes, accumulates)
        case ZeroConfig(zero_stage=3):
            return _zero_3(config, config.engine, sizes)
        case ZeroConfig():
            return _zero_1_2(config, config.engine, sizes, accumulates)
        case _:
            raise TypeError(f"no memory plan for {type(config.engine).__name__}")


def _fsdp(config: RunConfig, cfg: FsdpConfig, sizes: _Sizes, accumulates: bool) -> _State:
    """FSDP2: fp32 shards of weights, gradients and moments; whole weights of the root group and of two blocks,
    one of them prefetched.

    Gradients are reduced in every pass, so that a rank never holds more than its shard of those so far.
    """
    n = config.cluster.nodes * config.cluster.nproc // cfg.replicas
    e = element_bytes(cfg.precision)
    whole, trained = sizes.whole, sizes.trained
    shards = 4 * trained.total / n
    so_far = shards if accumulates else 0
    block, root = whole.block, whole.outside_blocks
    all_blocks = 0 if cfg.reshard_after_forward else e * whole.blocks
    head_gradient = e * trained.embedding
    root_gradients = e * trained.outside_blocks
    update = 16 * _largest_matrix(config.model) if isinstance(config.optim, MuonConfig) else 0
    return _State(
        weights=(4 * trained.total + e * sizes.frozen) / n,
        optimizer=moment_bytes(config.optim, trained) / n,
        moments=(
            (so_far, e * root + all_blocks),
            # The block's gradient in e bytes, and the fp32 buffer that it is reduced from.
            (so_far + head_gradient, e * root + (all_blocks or 2 * e * block) + (e + 4) * trained.block),
            (
                shards + root_gradients,
                e * root
                + (all_blocks or e * block)
                + e * trained.block
                + 4 * max(trained.block, trained.outside_blocks),
            ),
            (shards, update),
        ),
    )


def _largest_matrix(model: ModelConfig) -> int:
    """Elements of the largest of the blocks' matrices, which Muon gathers to orthogonalise: in fp32, with a
    copy, its result and the iteration's products in bf16."""
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    return model.dim * max(qkv, up_rows(model))


def _bucket(count: ParameterCount) -> int:
    """Elements of the buffer that DeepSpeed sends gradients through; train/engine/zero.py asks for this size."""
    return min(count.total, BUCKET)


def _zero_0(config: RunConfig, sizes: _Sizes, accumulates: bool) -> _State:
    """Everything whole in fp32, and in bf16 a copy of the trained weights from the forward to the backward pass."""
    e = element_bytes(config.engine.precision)
    count = sizes.trained
    total, copy = 4 * count.total, 2 * count.total if e == 2 else 0
    so_far = total if accumulates else 0
    head_gradient = 0 if accumulates else 4 * count.embedding
    return _State(
        weights=total + e * sizes.frozen,
        optimizer=moment_bytes(config.optim, count),
        moments=(
            (so_far, copy),
            (so_far + head_gradient, copy),
            (total, 4 * count.embedding),
            (total, 4 * _bucket(count)),  # DeepSpeed reduces flattened copies
        ),
    )


def _zero_1_2(config: RunConfig, cfg: ZeroConfig, sizes: _Sizes, accumulates: bool) -> _State:
    """Whole weights, and a part of the fp32 master copy and of the moments.

    In bf16, stage 1 is DeepSpeed's BF16_Optimizer: the whole gradient in bf16 and in fp32. Stage 2, and both in
    fp32, send gradients through a bucket; stage 2 keeps a part of them.
    """
    count = sizes.trained
    n = config.cluster.nodes * config.cluster.nproc
    e = element_bytes(cfg.precision)
    master = part = 4 * count.total / n
    moments = moment_bytes(config.optim, count) / n
    bucket = _bucket(count)
    head_gradient = e * count.embedding
    gradients: tuple[float, float, float, float]
    buffers: tuple[float, float, float, float]
    if cfg.zero_stage == 1 and e == 2 and not cfg.offload:
        gradients = (4 * count.total, 4 * count.total + head_gradient, 6 * count.total, 6 * count.total)
        buffers = (0, 0, 0, 4 * bucket)
    elif cfg.zero_stage == 1:
        whole = (6.0 if e == 2 else 4.0) * count.total
        so_far = whole * accumulates
        gradients = (so_far, so_far or head_gradient, whole, part)
        buffers = (0, 4 * bucket, 4 * bucket, part)
        if cfg.offload and e == 2:  # kept from the first step on
            buffers = (4 * bucket, 4 * bucket, 4 * bucket, 4 * bucket)
    else:
        so_far = part * accumulates
        gradients = (so_far, so_far + head_gradient, part + so_far * (e == 4), part)
        # What waits in the bucket: gradients, and in bf16 the fp32 copies that are sent.
        waiting = (6 if e == 2 else 4) * bucket
        buffers = (0, e * bucket, e * bucket + waiting, part)
    host = 0.0
    if cfg.offload:
        # Master copy, moments, gradients (those of earlier passes too), and the new weights on their way back.
        # The largest parameter is staged on both sides.
        largest = max(count.embedding, _largest_matrix(config.model))
        staged = e * min(largest, count.total)
        host = master + moments + part * (1 + accumulates) + e * count.total / n + staged
        buffers = (buffers[0] + staged, buffers[1] + staged, buffers[2] + staged, buffers[3] + staged)
        master = moments = 0.0
        if cfg.zero_stage == 2:
            gradients = (0, head_gradient, 0, 0)
    return _State(
        weights=e * sizes.whole.total,
        optimizer=master + moments,
        moments=tuple(zip(gradients, buffers, strict=True)),
        host=host,
    )


def _zero_3(config: RunConfig, cfg: ZeroConfig, sizes: _Sizes) -> _State:
    """Every state in parts, gradients in fp32; weights are gathered up to a number of elements, and the bucket
    that gradients go through is there from beginning to end. LoRA's factors are whole on every rank, being
    below DeepSpeed's stage3_param_persistence_threshold.
    """
    count, whole = sizes.trained, sizes.whole
    n = config.cluster.nodes * config.cluster.nproc
    e = element_bytes(cfg.precision)
    master = part = 4 * count.total / n
    moments = moment_bytes(config.optim, count) / n
    bucket = 4 * _bucket(count)
    gathered = e * min(whole.total, LIVE + whole.block)
    prefetch = e * min(whole.total, PREFETCH)
    waiting = (6 if e == 2 else 4) * _bucket(count)
    gradients, optimizer, host = part, master + moments, 0.0
    if cfg.offload:
        gradients, optimizer, host = 0.0, 0.0, master + moments + 2 * part
    return _State(
        weights=e * (sizes.frozen / n + (count.total if sizes.frozen else count.total / n)),
        optimizer=optimizer,
        moments=(
            (gradients, bucket + gathered + prefetch),
            (gradients, bucket + gathered + prefetch + e * count.embedding),
            (gradients, bucket + gathered + waiting),
            (gradients, bucket + part),
        ),
        host=host,
    )
