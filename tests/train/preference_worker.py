"""What each rank of the tests of preference learning trains; see rank.py.

Each case: {"name", "overrides", "steps", "run_dir"}.
"""

from pathlib import Path
from typing import Any

import numpy as np

from drivetrain.conf.compose import compose
from drivetrain.data.loader import share_of
from drivetrain.model.initialize import initialize
from drivetrain.train.build import build_engine, build_stage
from drivetrain.train.mesh import World
from drivetrain.train.optim import lr_factor
from drivetrain.train.stages.dpo import DpoStage
from drivetrain.train.stages.pairs import PairStage


def run_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    config = compose(case["overrides"])
    sequences = config.stage.tokens_per_step // config.stage.seq_len
    share = share_of(sequences, int(config.stage.micro_batch), world.rank, world.size)
    stage = build_stage(config, Path(case["run_dir"]), share, world, None)
    assert isinstance(stage, PairStage)
    engine = build_engine(config, world, lambda model: initialize(model, config.model, config.seed))
    if isinstance(stage, DpoStage):
        stage.prepare(engine, resumed=False)
    rows = []
    for step in range(case["steps"]):
        batches = stage.source.next_step()
        stats = engine.accumulate(batches, stage.loss)
        result = engine.step(lr_factor(config.optim, step, config.stage.steps))
        digest = world.sum_u64(sum(batch.digest for batch in batches) % (1 << 64))
        more = {"digest": digest, "norm": result.grad_norm}
        rows.append({**stats, **stage.after_step(engine, step + 1), **more})
    reference = stage.train_pairs["data"].reference
    return {
        "rows": rows,
        "eval": stage.evaluate(engine),
        "samples": stage.samples(engine),
        "notes": stage.notes,
        "reference": None if reference is None else np.asarray(reference).tolist(),
        "names": sorted(engine.tensors()),
    }
