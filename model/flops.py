"""How many parameters a model has, how many operations a token costs, and how many a GPU can do.

Pure arithmetic on a `ModelConfig`, so that a plan needs no torch.
"""

import re
from dataclasses import dataclass, replace

from drivetrain.conf.lora import adapters_of
from drivetrain.conf.schema import LoraConfig, Mlp, ModelConfig, Norm, Positions, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Exact numbers of parameters; a tied head is counted once, as the embedding.

    Attributes:
        block_matrices: the part of `blocks` that is multiplied with, and that Muon updates.
        positions: learned ones, looked up like the embedding.
        matmul: what each token is multiplied with: the blocks' matrices and the head, tied or not. Embeddings
            are looked up and not multiplied.
    """

    total: int
    embedding: int
    positions: int
    head: int
    blocks: int
    block: int
    block_matrices: int
    final_norm: int
    matmul: int

    @property
    def outside_blocks(self) -> int:
        """Embeddings, head and last norm: one FSDP group."""
        return self.total - self.blocks


def up_rows(model: ModelConfig) -> int:
    """Rows of the MLP's first matrix: gate and up, or up alone."""
    return model.ffn_dim * (2 if model.mlp is Mlp.swiglu else 1)


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Count the parameters of `drivetrain.model.transformer` without building it."""
    dim, ffn = model.dim, model.ffn_dim
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    up, norm = up_rows(model), dim * (2 if model.norm is Norm.layer else 1)
    matrices = dim * (q + 2 * kv) + q * dim + dim * (up + ffn)
    vectors = 2 * norm + 2 * model.head_dim * model.qk_norm
    vectors += (q + 2 * kv) * model.qkv_bias + dim * model.out_bias + (up + dim) * model.mlp_bias
    table = model.vocab_size * dim
    positions = model.max_seq_len * dim if model.positions is Positions.learned else 0
    head = 0 if model.tie_embeddings else table
    blocks = model.layers * (matrices + vectors)
    return ParameterCount(
        total=table + positions + head + blocks + norm,
        embedding=table,
        positions=positions,
        head=head,
        blocks=blocks,
        block=matrices + vectors,
        block_matrices=model.layers * matrices,
        final_norm=norm,
        matmul=model.layers * matrices + table,
    )


def trained_count(model: ModelConfig, lora: LoraConfig) -> tuple[ParameterCount, ParameterCount]:
    """All parameters with a run's adapters, and those that it trains: all of them, or with LoRA the adapters."""
    count = parameter_count(model)
    sizes = [lora.rank * (spec.rows + spec.columns) for spec in adapters_of(model, lora)]
    if not sizes:
        return count, count
    total = sum(sizes)
    block = total // model.layers
    none = dict.fromkeys(("embedding", "positions", "head", "final_norm"), 0)
    adapters = ParameterCount(
        total=total, blocks=total, block=block, block_matrices=total, matmul=total, **none
    )
    whole = replace(
        count,
        total=count.total + total,
        blocks=count.blocks + total,
        block=count.block + block,
        block_matrices=count.block_matrices + total,
        matmul=count.matmul + total,
    )
    return whole, adapters


def mean_context(model: ModelConfig, seq_len: int) -> float:
    """Keys that a query sees, averaged over a sequence of one document: w − w²/2S, where w is the smaller of
    the sliding window and S; S/2 without a window."""
    window = min(model.sliding_window or seq_len, seq_len)
    return window - window * window / (2 * seq_len)


def train_flops_per_token(model: ModelConfig, seq_len: int, lora: LoraConfig | None = None) -> float:
    """Floating-point operations of one forward and backward pass, per token.

        6 · matmul parameters  +  12 · layers · heads · head_dim · context

    A multiplication by a weight costs 2 operations forward and 4 backward, of which 2 are the weight's gradient:
    LoRA's frozen weights cost 4 in all, its adapters 6. Embeddings stay as they are, looked up for nothing, while
    the head's product counts. Attention multiplies queries with keys and probabilities with values,
    2 · 2 · heads · head_dim operations a key forward and twice that backward; `mean_context` counts the causal half
    once (S/2 for PaLM's S, appendix B) and leaves packed documents, norms and recomputation out.
    """
    attention = 12 * model.layers * model.heads * model.head_dim * mean_context(model, seq_len)
    whole, trained = trained_count(model, lora or LoraConfig())
    return 4.0 * whole.matmul + 2.0 * trained.matmul + attention


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Data-sheet numbers: bytes of memory, and dense operations a second (half of what is given for sparsity).

    `fp32` is without tensor cores; `tf32` is what they do with fp32 inputs.
    """

    name: str
    pattern: str  # of the name that the driver reports
    memory: float
    bf16: float
    tf32: float
    fp32: float


# The makers' data sheets. More specific patterns come first.
GPUS = (
    Gpu(name="B200", pattern=r"\bB200\b", memory=180e9, bf16=2250e12, tf32=1125e12, fp32=75e12),
    Gpu(name="H200", pattern=r"\bH200\b", memory=141e9, bf16=989e12, tf32=494e12, fp32=67e12),
    Gpu(name="H100 PCIe", pattern=r"\bH100 PCIe\b", memory=80e9, bf16=756e12, tf32=378e12, fp32=51e12),
    Gpu(name="H100 NVL", pattern=r"\bH100 NVL\b", memory=94e9, bf16=835e12, tf32=417e12, fp32=60e12),
    Gpu(
        name="H100 SXM",
        pattern=r"\bH100( SXM| 80GB HBM3)?\b",
        memory=80e9,
        bf16=989e12,
        tf32=494e12,
        fp32=67e12,
    ),
    Gpu(name="A100 40GB", pattern=r"\bA100\b.*\b40GB", memory=40e9, bf16=312e12, tf32=156e12, fp32=19.5e12),
    Gpu(name="A100", pattern=r"\bA100\b", memory=80e9, bf16=312e12, tf32=156e12, fp32=19.5e12),
    Gpu(name="L40S", pattern=r"\bL40S\b", memory=48e9, bf16=362e12, tf32=183e12, fp32=91.6e12),
    Gpu(name="A10", pattern=r"\bA10\b", memory=24e9, bf16=125e12, tf32=62.5e12, fp32=31.2e12),
    Gpu(
        name="RTX 4090",
        pattern=r"\bRTX 4090\b(?! (D|Laptop))",
        memory=24e9,
        bf16=165e12,
        tf32=82.6e12,
        fp32=82.6e12,
    ),
    Gpu(name="MI300X", pattern=r"\bMI300X\b", memory=192e9, bf16=1307e12, tf32=653e12, fp32=163e12),
)


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that a driver (`NVIDIA H100 80GB HBM3`) or a person (`h100 sxm`) means; None when not known."""
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device_name, re.IGNORECASE)), None)


def peak_flops(device_name: str, precision: Precision | str) -> float | None:
    """Dense operations a second at the device's peak; None for a CPU or a GPU that is not in the table.

    Args:
        precision: bf16, tf32 (fp32 tensors through tensor cores) or fp32 (without them).

    Raises:
        ValueError: another precision.
    """
    word = precision.value if isinstance(precision, Precision) else precision
    if word not in ("bf16", "tf32", "fp32"):
        raise ValueError(f"precision {word} is not bf16, tf32 or fp32")
    gpu = find_gpu(device_name)
    return float(getattr(gpu, word)) if gpu is not None else None
