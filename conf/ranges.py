"""The range of every number that a run has."""

import math
from typing import NamedTuple


class Range(NamedTuple):
    """An interval of finite numbers."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int) and not (isinstance(value, float) and math.isfinite(value)):
            return False
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "a finite number"
        above = f"above {self.low}" if self.low_open else f"at least {self.low}"
        if self.high == math.inf:
            return above
        if self.low_open or self.high_open:
            return f"{above} and {'below' if self.high_open else 'at most'} {self.high}"
        return f"between {self.low} and {self.high}"


COUNT, ZERO_OR_MORE, ABOVE_ZERO = Range(1), Range(0), Range(0, low_open=True)
ANY, SHARE, DECAY = Range(-math.inf), Range(0, 1), Range(0, 1, high_open=True)

# Every number of the schema; a test compares.
RANGES = {
    "cluster.port": Range(1, 65535),
    "seed": Range(0, 2**63 - 1),
    "model.vocab_size": COUNT,
    "model.dim": COUNT,
    "model.layers": COUNT,
    "model.heads": COUNT,
    "model.kv_heads": COUNT,
    "model.head_dim": COUNT,
    "model.ffn_dim": COUNT,
    "model.max_seq_len": COUNT,
    "model.rope_theta": ABOVE_ZERO,
    "model.rope_scaling.factor": COUNT,
    "model.rope_scaling.low_freq_factor": ABOVE_ZERO,
    "model.rope_scaling.high_freq_factor": ABOVE_ZERO,
    "model.rope_scaling.original_max_seq_len": COUNT,
    "model.nope_every": ZERO_OR_MORE,
    "model.norm_eps": ABOVE_ZERO,
    "model.sliding_window": COUNT,
    "model.init_std": ABOVE_ZERO,
    "stage.steps": COUNT,
    "stage.seq_len": COUNT,
    "stage.tokens_per_step": COUNT,
    "stage.eval_every": ZERO_OR_MORE,
    "stage.eval_tokens": COUNT,
    "stage.save_every": ZERO_OR_MORE,
    "stage.log_every": COUNT,
    "stage.sample_tokens": COUNT,
    "stage.z_loss": ZERO_OR_MORE,
    "stage.prompts_per_step": COUNT,
    "stage.group_size": COUNT,
    "stage.max_completion": COUNT,
    "stage.environment_weight": ANY,
    "stage.rewards.gym.weight": ANY,
    "stage.rewards.gym.seconds": ABOVE_ZERO,
    "stage.rewards.exact.weight": ANY,
    "stage.rewards.regex.weight": ANY,
    "stage.rewards.format.weight": ANY,
    "stage.rewards.math.weight": ANY,
    "stage.rewards.math.seconds": ABOVE_ZERO,
    "stage.rewards.overlong.weight": ANY,
    "stage.rewards.overlong.buffer": ZERO_OR_MORE,
    "stage.rewards.code.weight": ANY,
    "stage.rewards.code.workers": ZERO_OR_MORE,
    "stage.rewards.code.sandbox.seconds": ABOVE_ZERO,
    "stage.rewards.code.sandbox.cpu_seconds": COUNT,
    "stage.rewards.code.sandbox.memory": COUNT,
    "stage.rewards.code.sandbox.disk": COUNT,
    "stage.rewards.code.sandbox.output": COUNT,
    "stage.rewards.code.sandbox.processes": COUNT,
    "stage.rewards.rubric.weight": ANY,
    "stage.rewards.rubric.seconds": ABOVE_ZERO,
    "stage.rewards.rubric.tries": COUNT,
    "stage.rewards.rubric.concurrent": COUNT,
    "stage.rewards.rubric.per_minute": ZERO_OR_MORE,
    "stage.rewards.rubric.max_tokens": COUNT,
    "stage.rewards.reward_model.weight": ANY,
    "stage.rewards.custom.weight": ANY,
    "stage.rewards.checkers": COUNT,
    "stage.rollout.max_staleness": ZERO_OR_MORE,
    "stage.rollout.timeout_seconds": ABOVE_ZERO,
    "stage.rollout.retries": ZERO_OR_MORE,
    "stage.rollout.kv_tokens": ZERO_OR_MORE,
    "stage.rollout.server.concurrent": COUNT,
    "stage.rollout.vllm.memory": Range(0, 1, low_open=True),
    "stage.updates": COUNT,
    "stage.temperature": ABOVE_ZERO,
    "stage.top_p": Range(0, 1, low_open=True),
    "stage.top_k": ZERO_OR_MORE,
    "stage.clip_low": Range(0, 1, low_open=True),
    "stage.clip_high": ABOVE_ZERO,
    "stage.max_tries": COUNT,
    "stage.kl_coef": ZERO_OR_MORE,
    "stage.entropy_coef": ANY,
    "stage.importance_cap": Range(1),
    "stage.eval_problems": COUNT,
    "stage.eval_samples": ZERO_OR_MORE,
    "stage.beta": ABOVE_ZERO,
    "stage.margin": ZERO_OR_MORE,
    "stage.label_smoothing": Range(0, 0.5, high_open=True),
    "lora.rank": ZERO_OR_MORE,
    "lora.alpha": ABOVE_ZERO,
    "lora.dropout": DECAY,
    "engine.replicas": COUNT,
    "engine.zero_stage": Range(0, 3),
    "data.prefetch": ZERO_OR_MORE,
    "optim.lr": ABOVE_ZERO,
    "optim.warmup_steps": ZERO_OR_MORE,
    "optim.min_lr_ratio": SHARE,
    "optim.decay_ratio": Range(0, 1, low_open=True),
    "optim.weight_decay": ZERO_OR_MORE,
    "optim.beta1": DECAY,
    "optim.beta2": DECAY,
    "optim.eps": ABOVE_ZERO,
    "optim.grad_clip": ZERO_OR_MORE,
    "optim.matrix_lr": ABOVE_ZERO,
    "optim.momentum": DECAY,
    "optim.ns_steps": COUNT,
    "cluster.nodes": COUNT,
    "cluster.nproc": COUNT,
    "cluster.omp_threads": ZERO_OR_MORE,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every": ZERO_OR_MORE,
    "alarms.spike_factor": Range(1, low_open=True),
    "alarms.window": COUNT,
    "alarms.max_skipped": ZERO_OR_MORE,
}
