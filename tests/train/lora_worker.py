"""What each rank of the LoRA tests trains; see rank.py.

Each case: {"name", "overrides", "steps", and optionally "load": folder, "save": folder, "poison": steps}. Out: one
row a step, the sums of all merged weights, and the dtypes of the frozen ones.
"""

from pathlib import Path
from typing import Any

from drivetrain.conf.compose import compose
from drivetrain.data.loader import share_of
from drivetrain.train import build, checkpoint
from drivetrain.train.adapters import base_state, find_base
from drivetrain.train.mesh import World
from drivetrain.train.optim import lr_factor
from drivetrain.train.stages.pretrain import PretrainStage


def run_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    config = compose(case["overrides"])
    folder = Path(case["load"]) if "load" in case else None
    state = checkpoint.read_state(folder) if folder else None
    sequences = config.stage.tokens_per_step // config.stage.seq_len
    share = share_of(sequences, int(config.stage.micro_batch), world.rank, world.size)
    stage = PretrainStage(config, share, world, Path("no tokenizer"), state["source"] if state else None)
    base = find_base(config, build.newest_weights, state, world)
    engine = build.build_engine(config, world, build._fill(config, folder, base))
    if folder and state:
        engine.load_optimizer(
            lambda tensors: checkpoint.load_tensors(folder, tensors), state["optimizer_steps"]
        )
    rows = []
    start = state["step"] if state else 0
    for step in range(start + 1, start + case["steps"] + 1):
        poisoned = step in case.get("poison", []) and world.rank == world.size - 1

        def loss(model: Any, batch: Any, poisoned: bool = poisoned) -> Any:
            minimise, stats = stage.loss(model, batch)
            return minimise * float("nan") if poisoned else minimise, stats

        stats = engine.accumulate(stage.source.next_step(), loss)
        result = engine.step(lr_factor(config.optim, step - 1, config.stage.steps))
        rows.append({"loss": stats["loss"], "norm": result.grad_norm, "skipped": result.skipped})
    if "save" in case:
        saver = checkpoint.Checkpointer(Path(case["save"]), config.checkpoint, world)
        found = {
            "step": start + case["steps"],
            "optimizer_steps": engine.optimizer_steps(),
            "source": stage.source.state(),
            **base_state(base),
            **checkpoint.origin(config),
        }
        failed = saver.save(found["step"], engine.tensors(), found) or saver.wait()
        assert failed is None, failed
    whole = {name: weight.double().sum().item() for name, weight in engine.full_weights()}
    dtypes = {str(p.dtype) for p in engine.transformer.parameters() if not p.requires_grad}
    return {"rows": rows, "sums": whole, "frozen": sorted(dtypes)}
