"""What each engine holds whatever the activations are: weights, optimizer, gradients, buffers.

n ranks that share the parameters · e bytes of a number in the forward pass, 2 in bf16 and 4 in fp32. The moments of
a step are those of model/memory.py.
"""

from dataclasses import dataclass

from drivetrain.conf.schema import (
    FsdpConfig,
    ModelConfig,
    MuonConfig,
    OptimConfig,
    Precision,
    RunConfig,
    ZeroConfig,
)
from drivetrain.model.flops import ParameterCount, trained_count, up_rows

BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size, an upper bound here
LIVE = 1_000_000_000  # elements: DeepSpeed's stage3_max_live_parameters
PREFETCH = 50_000_000  # elements: DeepSpeed's stage3_prefetch_bucket_size


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What an engine holds whatever the activations are; pairs of (gradients, buffers) by moment."""

    weights: float
    optimizer: float
    moments: tuple[tuple[float, float], ...]
    host: float = 0


def moment_bytes(optim: OptimConfig, count: ParameterCount) -> int:
    """fp32 optimizer moments: two a parameter with AdamW; one for each of the blocks' matrices with Muon."""
    if isinstance(optim, MuonConfig):
        return 8 * count.total - 4 * count.block_matrices
    return 8 * count.total


def element_bytes(precision: Precision) -> int:
    return 2 if precision is Precision.bf16 else 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Numbers of parameters: all that a rank's model has, those that are trained, and those that are frozen.

    Trained ones have an fp32 master copy; frozen ones lie in the dtype of the forward pass (model/lora.py).
    """

    whole: ParameterCount
    trained: ParameterCount

    @property
    def frozen(self) -> int:
        return self.whole.total - self.trained.total


def engine_state(config: RunConfig, accumulates: bool) -> State:
    whole, trained = trained_count(config.model, config.lora)
    sizes = Sizes(whole=whole, trained=trained)
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


def start_bytes(config: RunConfig) -> int:
    """Bytes of weights on each rank before the first step; 0 with engine=fsdp, whose ranks fill their shards.

    train/engine/zero.py makes the model whole on every rank before DeepSpeed divides it: frozen weights in their
    own dtype (train/build.py), others in fp32.
    """
    if not isinstance(config.engine, ZeroConfig):
        return 0
    whole, trained = trained_count(config.model, config.lora)
    wide = config.engine.zero_stage == 0 or config.engine.precision is Precision.fp32
    return 4 * trained.total + (4 if wide else 2) * (whole.total - trained.total)


def _fsdp(config: RunConfig, cfg: FsdpConfig, sizes: Sizes, accumulates: bool) -> State:
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
    return State(
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


def _zero_0(config: RunConfig, sizes: Sizes, accumulates: bool) -> State:
    """Everything whole in fp32, and in bf16 a copy of the trained weights from the forward to the backward pass."""
    e = element_bytes(config.engine.precision)
    count = sizes.trained
    total, copy = 4 * count.total, 2 * count.total if e == 2 else 0
    so_far = total if accumulates else 0
    head_gradient = 0 if accumulates else 4 * count.embedding
    return State(
        weights=total + e * sizes.frozen,
        optimizer=moment_bytes(config.optim, count),
        moments=(
            (so_far, copy),
            (so_far + head_gradient, copy),
            (total, 4 * count.embedding),
            (total, 4 * _bucket(count)),  # DeepSpeed reduces flattened copies
        ),
    )


def _zero_1_2(config: RunConfig, cfg: ZeroConfig, sizes: Sizes, accumulates: bool) -> State:
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
    return State(
        weights=e * sizes.whole.total,
        optimizer=master + moments,
        moments=tuple(zip(gradients, buffers, strict=True)),
        host=host,
    )


def _zero_3(config: RunConfig, cfg: ZeroConfig, sizes: Sizes) -> State:
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
    return State(
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
