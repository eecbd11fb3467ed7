"""What each rank of the parity tests trains; see rank.py.

Each case: {"name", "overrides", "steps", and optionally "poison": steps, "load": folder, "save": folder and
"save_after": step, the last one by default}.
"""

from pathlib import Path
from typing import Any

from drivetrain.conf.compose import compose
from drivetrain.data.loader import PretrainSource, share_of
from drivetrain.model.initialize import initialize
from drivetrain.train import checkpoint
from drivetrain.train.build import build_engine
from drivetrain.train.mesh import World
from drivetrain.train.optim import lr_factor
from drivetrain.train.stages.pretrain import PretrainStage


def run_case(case: dict[str, Any], world: World) -> list[dict[str, Any]]:
    config = compose(case["overrides"])
    sequences = config.stage.tokens_per_step // config.stage.seq_len
    share = share_of(sequences, int(config.stage.micro_batch), world.rank, world.size)
    stage = PretrainStage(config, share, world, Path("no tokenizer"), None)
    folder = Path(case["load"]) if "load" in case else None
    state = checkpoint.read_state(folder) if folder else None
    if state:
        stage.source = PretrainSource(config.data, config.stage.seq_len, share, config.seed, state["source"])

    def fill(model: Any) -> None:
        if folder is None:
            return initialize(model, config.model, config.seed)
        from drivetrain.model.transformer import unique_parameters

        return checkpoint.load_tensors(
            folder, {f"model.{n}": p.detach() for n, p in unique_parameters(model)}
        )

    engine = build_engine(config, world, fill)
    start = 0
    if folder and state:
        engine.load_optimizer(
            lambda tensors: checkpoint.load_tensors(folder, tensors), state["optimizer_steps"]
        )
        start = state["step"]

    def loss(model: Any, batch: Any) -> Any:
        minimise, stats = stage.loss(model, batch)
        poisoned = step in case.get("poison", []) and world.rank == world.size - 1
        return (minimise * float("nan") if poisoned else minimise), stats

    rows = []
    stop = start + case["steps"]
    for step in range(start + 1, stop + 1):
        batches = stage.source.next_step()
        stats = engine.accumulate(batches, loss)
        result = engine.step(lr_factor(config.optim, step - 1, config.stage.steps))
        digest = world.sum_u64(sum(batch.digest for batch in batches) % (1 << 64))
        rows.append({**stats, "digest": digest, "norm": result.grad_norm, "skipped": result.skipped})
        if "save" in case and step == case.get("save_after", stop):
            saver = checkpoint.Checkpointer(Path(case["save"]), config.checkpoint, world)
            state = {
                "step": step,
                "optimizer_steps": engine.optimizer_steps(),
                "source": stage.source.state(),
            }
            failed = saver.save(step, engine.tensors(), state) or saver.wait()
            assert failed is None, failed
    return rows
