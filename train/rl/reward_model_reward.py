"""A trained reward model as a reward: reinforcement learning from human feedback (RLHF).

D width · C conversations of one pass.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import Kernels
from drivetrain.conf.source import Kind, kind_of, model_of, tokenizer_of
from drivetrain.data.chat import Chat
from drivetrain.data.packing import best_fit
from drivetrain.data.readers import Unusable
from drivetrain.data.sft import batch_from_rows
from drivetrain.model.backend import backend_of
from drivetrain.model.transformer import build_model
from drivetrain.model.value_head import give_value_head
from drivetrain.train.build import fill_from, weights_folder
from drivetrain.train.checkpoint import is_reward_model
from drivetrain.train.evaluate import documents_of
from drivetrain.train.rl.rewards import Sample

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # of one pass


class RewardModelReward:
    """Scores of a `stage=reward_model` run, a whole copy of it on one device; higher is better, about a mean that
    means nothing.

    A conversation is rendered with the reward model's own tokenizer and template, however the policy writes. Of one
    that is longer than the model's `max_seq_len` the end is scored.

    Args:
        run_dir: the run, or one of its checkpoints.
        device: None: this process's GPU, else the CPU. Weights are in bf16 on a GPU, in fp32 on the CPU.
        batch_tokens: of one pass; None: what suits the device.

    Raises:
        ConfigError: the directory is no run of stage=reward_model, has no tokenizer or chat template, or has not
            saved a checkpoint. CheckpointError: the weights are damaged.
    """

    def __init__(
        self, run_dir: Path, device: torch.device | None = None, batch_tokens: int | None = None
    ) -> None:
        if kind_of(run_dir) not in (Kind.run, Kind.checkpoint) or not is_reward_model(
            weights_folder(run_dir)
        ):
            raise ConfigError(
                f"{run_dir} holds no reward model; train one with `drivetrain launch stage=reward_model` and name "
                "its run directory"
            )
        tokenizer = tokenizer_of(run_dir)
        if tokenizer is None:
            raise ConfigError(f"{run_dir} has no tokenizer.json; copy the files of its tokenizer there")
        self.chat = Chat(tokenizer)
        self.cfg = model_of(run_dir)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.device.type]
        self.backend = backend_of(Kernels.auto, self.device, self.cfg.head_dim)
        self.model = build_model(self.cfg, self.backend)
        give_value_head(self.model)
        self.model.materialize(self.device)
        self.model.requires_grad_(False)
        fill_from(run_dir, self.cfg)(self.model)
        self.model.to(torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """One score for each sample, in their order, under "reward_model"; NaN where the chat template refuses the
        conversation."""
        tokens = [self._tokens(sample) for sample in samples]
        scores = [math.nan] * len(samples)
        for members in self._passes([len(each) for each in tokens]):
            found = self._pass([tokens[member] for member in members])
            for member, score in zip(members, found, strict=True):
                scores[member] = score
        return {"reward_model": scores}

    def _tokens(self, sample: Sample) -> np.ndarray:
        """int64; none where the template refuses the conversation."""
        answered = [*map(dict, sample.messages), {"role": "assistant", "content": sample.completion}]
        try:
            text = self.chat.render(answered)
        except Unusable:
            return np.zeros(0, dtype=np.int64)
        ids = self.chat.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids[-self.cfg.max_seq_len :], dtype=np.int64)

    def _passes(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices, the longest first, so that rows are alike: about `batch_tokens` in each pass."""
        members: list[int] = []
        room = self.batch_tokens
        for index in sorted(np.flatnonzero(lengths).tolist(), key=lambda index: -lengths[index]):
            if members and lengths[index] > room:
                yield members
                members, room = [], self.batch_tokens
            members.append(index)
            room -= lengths[index]
        if members:
            yield members

    @torch.no_grad()
    def _pass(self, conversations: list[np.ndarray]) -> list[float]:
        lengths = np.array([len(tokens) for tokens in conversations])
        S = int(lengths.max())
        rows = best_fit(lengths, S)
        parts = [
            [(conversations[i], np.zeros(lengths[i], dtype=np.uint8)) for i in members] for members in rows
        ]
        batch = batch_from_rows(parts, S, pad_id=0).to(self.device)
        ends = np.empty(len(conversations), dtype=np.int64)
        for row, members in enumerate(rows):
            ends[members] = row * S + np.cumsum(lengths[members]) - 1
        ends_C = torch.from_numpy(ends).to(self.device)

        def read(hidden_TD: Tensor, score_1D: Tensor) -> Tensor:
            return F.linear(hidden_TD.index_select(0, ends_C).float(), score_1D.float()).squeeze(1)

        documents = documents_of(batch, self.cfg.sliding_window, self.backend)
        scores_C: Tensor = self.model(batch.tokens_T, batch.positions_T, documents, read)
        found: list[float] = scores_C.tolist()
        return found
