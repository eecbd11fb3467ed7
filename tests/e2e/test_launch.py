"""What a user sees of a job: its files, its failures, its sweeps, and starting it by hand."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from drivetrain.conf.compose import compose
from drivetrain.launch.run_dir import make_run_dir

Cli = Any
WaitForAll = Callable[[list[subprocess.Popen[Any]], float], list[int]]
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PYTHONSAFEPATH": "1"}


def test_the_run_directory_holds_everything(undisturbed: Cli) -> None:
    run = undisturbed.folder / "whole"
    for name in ("config.yaml", "overrides.txt", "environment.json", "metrics.jsonl", "summary.json"):
        assert (run / name).is_file(), name
    assert (run / "logs" / "rank_0.log").is_file() and (run / "logs" / "rank_1.log").is_file()
    summary = undisturbed.summary("whole")
    assert summary["status"] == "completed" and summary["steps"] == 24
    assert summary["objective"] == summary["final"]["eval/loss"]
    assert summary["best"]["eval/loss"] < 6.3 and summary["peak_memory_bytes"] > 1e8
    first, *_, last = undisturbed.rows("whole")
    for key in (
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "lr",
        "step_seconds",
        "tokens_per_second",
        "data_digest",
    ):
        assert key in first, key
    assert last["loss"] < first["loss"] and last["tokens"] == 24 * 256
    assert torch.__version__ == json.loads((run / "environment.json").read_text())["versions"]["torch"]


def test_generate_and_report(undisturbed: Cli) -> None:
    words = ("generate", "whole", "--prompt", "import ", "--max-tokens", "5", "--seed", "3", "--json")
    first, second = (json.loads(undisturbed(*words).stdout) for _ in range(2))
    assert first == second
    assert set(first) == {"text", "tokens", "logprobs", "finish_reason"}
    assert len(first["tokens"]) == 5 and all(logprob < 0 for logprob in first["logprobs"])
    assert undisturbed(*words[:-1]).stdout == "import " + first["text"] + "\n"
    page = Path(undisturbed("report", "whole").stdout.strip())
    text = (undisturbed.folder / page).read_text()
    assert text.count("data:image/svg+xml;base64,") + text.count("data:image/png;base64,") >= 4
    assert not re.search(r"(src|href)=[\"']https?://", text)


def test_dry_run_shows_the_command_and_makes_nothing(cli: Cli) -> None:
    said = cli(*cli.small("run", "cluster.dry_run=true")).stdout
    assert "torch.distributed.run" in said and "--nproc-per-node=2" in said
    assert not (cli.folder / "run").exists()


def test_launching_into_a_run_that_exists(undisturbed: Cli) -> None:
    same = undisturbed(*undisturbed.small("whole"), status=2).stderr
    assert "drivetrain resume" in same
    other = undisturbed(*undisturbed.small("whole", "optim.lr=0.1"), status=2).stderr
    assert "optim.lr" in other and "0.1" in other and "Traceback" not in other


def test_resume_refuses_what_would_change_the_data(undisturbed: Cli) -> None:
    for word in ("seed=1", "stage.tokens_per_step=512", "model.layers=3"):
        said = undisturbed("resume", "whole", word, status=2).stderr
        assert word.split("=")[0] in said, said
    assert "nowhere" in undisturbed("resume", "nowhere", status=2).stderr


def test_a_run_that_is_done_says_so_and_keeps_its_summary(undisturbed: Cli) -> None:
    before = undisturbed.summary("whole")
    assert "has done 24 of stage.steps=24" in undisturbed("resume", "whole", status=2).stderr
    assert undisturbed.summary("whole") == before


def test_a_rank_that_is_killed_is_named(cli: Cli) -> None:
    launcher = cli.start(*cli.small("run", "stage.steps=5000"))
    cli.wait_for_step("run", 3, launcher)
    children = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [
        p
        for p in children
        if "drivetrain.train" in p.cmdline() and "torch.distributed.run" not in p.cmdline()
    ]
    victim = next(p for p in ranks if p.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGKILL)
    said = launcher.communicate(timeout=90)[0]
    assert launcher.returncode == 1
    assert "rank 1 failed: killed by SIGKILL" in said and "rank_1.log" in said
    assert cli.summary("run")["status"] == "failed"


def test_a_failure_with_a_known_reason_is_that_reason(cli: Cli) -> None:
    """The weights overflow at once: ten skipped steps in a row end the run."""
    said = cli(*cli.small("run", "optim.lr=1e38", "stage.eval_every=0", "optim.grad_clip=0"), status=1).stderr
    assert "10 steps in a row had no finite gradient" in said
    assert "Traceback" not in said and re.search(r"rank_[01]\.log", said)


def test_a_rank_that_crashes_is_shown_with_its_last_lines(cli: Cli) -> None:
    """Somebody edited a checkpoint's state and its marker: no sentence of ours was prepared for that."""
    cli(*cli.small("run", "stage.steps=4", "stage.save_every=4"))
    (cli.folder / "run" / "checkpoints" / "step_00000004" / "state.json").write_text('{"step": "x"}')
    marker = cli.folder / "run" / "checkpoints" / "step_00000004" / "complete.json"
    digests = json.loads(marker.read_text())
    digests["files"].pop("state.json")
    marker.write_text(json.dumps(digests))
    said = cli("resume", "run", "stage.steps=8", status=1).stderr
    assert "its last lines:" in said and "ValueError" in said and "rank_" in said


@pytest.mark.parametrize(
    "command",
    [
        [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "drivetrain.train"],
        [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes=1", "-m", "drivetrain.train"],
        [str(BIN / "deepspeed"), "--num_accelerators=2", "--module", "drivetrain.train"],
        [sys.executable, "-m", "drivetrain.train"],
    ],
    ids=["torchrun", "accelerate", "deepspeed", "alone"],
)
def test_a_run_directory_can_be_started_by_hand(cli: Cli, undisturbed: Cli, command: list[str]) -> None:
    """`launch` makes the directory; any launcher that sets RANK and WORLD_SIZE starts it."""
    run_dir = cli.folder / "run"
    words = [word for word in cli.small(str(run_dir)) if "=" in word]
    make_run_dir(compose(words), words, run_dir)
    path = f"{BIN}:{os.environ['PATH']}"  # deepspeed's launcher looks for its own parts there
    env = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(run_dir)], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    log = (run_dir / "logs" / "rank_0.log").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    expected = {step: loss for step, (loss, _) in undisturbed.curve("whole").items()}
    found = {step: loss for step, (loss, _) in cli.curve("run").items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_srun_sets_other_variables(cli: Cli, undisturbed: Cli, wait_for_all: WaitForAll) -> None:
    """What Slurm's srun gives each of two tasks on one node; no torchrun, no RANK."""
    run_dir = cli.folder / "run"
    words = [word for word in cli.small(str(run_dir)) if "=" in word]
    make_run_dir(compose(words), words, run_dir)
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "drivetrain.train", str(run_dir)],
            env={
                **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
                **slurm,
                "SLURM_PROCID": str(task),
                "SLURM_LOCALID": str(task),
                "PYTHONSAFEPATH": "1",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
        )
        for task in range(2)
    ]
    assert wait_for_all(tasks, 120) == [0, 0]
    assert cli.curve("run") == undisturbed.curve("whole")


def test_cluster_torchrun_prints_what_every_node_runs(
    cli: Cli, undisturbed: Cli, free_port: Callable[[], int], wait_for_all: WaitForAll
) -> None:
    """Two "nodes" of one rank each on this machine, started with the printed line."""
    words = ("cluster=torchrun", "cluster.nodes=2", "cluster.nproc=1", f"cluster.port={free_port()}")
    said = cli(*(word for word in cli.small("run", *words) if word != "cluster.nproc=2")).stdout
    line = said.strip().splitlines()[-1]
    nodes = [subprocess.Popen(["sh", "-c", line], stdout=subprocess.DEVNULL, env=ENV) for _ in range(2)]
    assert wait_for_all(nodes, 120) == [0, 0]
    assert cli.curve("run") == undisturbed.curve("whole")


def test_a_sweep_runs_every_point_and_records_a_failed_one(cli: Cli) -> None:
    """The first point's weights overflow; the sweep's own directory holds both."""
    words = cli.small("sweep", "stage.steps=4", "stage.eval_every=4", "stage.save_every=0", "cluster.nproc=1")
    grid = ("optim.lr=1e38,1e-3", "optim.grad_clip=0", "alarms.max_skipped=2")
    done = cli("launch", "-m", *words[1:], *grid, status=1)
    assert "2 steps in a row had no finite gradient" in done.stdout and "Traceback" not in done.stderr
    assert cli.summary("sweep/0")["status"] == "failed"
    good = cli.summary("sweep/1")
    assert good["status"] == "completed" and good["objective"] == good["final"]["eval/loss"]
    assert f"{good['objective']:.4f}" in done.stdout and (cli.folder / "sweep" / "multirun.yaml").is_file()


def test_a_signal_ends_a_sweep_and_nobody_else_may_train_there(cli: Cli) -> None:
    words = cli.small("sweep", "stage.steps=5000", "stage.eval_every=0", "cluster.nproc=1")
    launcher = cli.start("launch", "-m", *words[1:], "seed=1,2")
    cli.wait_for_step("sweep/0", 3, launcher)
    said = cli("resume", "sweep/0", status=2).stderr
    assert f"sweep/0 is in use by process {launcher.pid} on " in said
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 75, said
    assert cli.summary("sweep/0")["status"] == "preempted" and cli.summary("sweep/0")["steps"] >= 3
    assert not (cli.folder / "sweep" / "1").exists()


def _started(launcher: subprocess.Popen[str], module: str) -> int:
    """How many processes below the launcher run a module."""
    found = 0
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.cmdline()[1:3] == ["-m", module] or process.cmdline()[2:4] == ["-m", module]
    return found


@pytest.mark.parametrize(("module", "count"), [("torch.distributed.run", 1), ("drivetrain.train", 2)])
def test_a_signal_while_everything_starts(module: str, count: int, cli: Cli, undisturbed: Cli) -> None:
    """Before there are ranks that could be asked, or just after: it is no failure, and what is known stays."""
    shutil.copytree(undisturbed.folder / "whole", cli.folder / "run")
    before = cli.summary("run")
    launcher = cli.start("resume", "run", "stage.steps=5000")
    cli.wait_until(lambda: _started(launcher, module) == count, launcher)
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 75, said
    after = cli.summary("run")
    assert after["status"] == "preempted"
    for key in ("steps", "final", "best", "objective"):
        assert after[key] == before[key]
    assert cli.curve("run") == undisturbed.curve("whole")


def test_wandb_offline_files_hold_the_metrics_and_a_resume_keeps_the_run(
    cli: Cli, wandb_history: Callable[[Path, str], list[tuple[int, float]]]
) -> None:
    cli(*cli.small("run", "tracker=wandb", "stage.steps=8", "optim.schedule=constant", "stage.eval_every=4"))
    cli("resume", "run", "stage.steps=12")
    segments = sorted((cli.folder / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(segments) == 2
    assert len({path.name for path in segments}) == 1  # the same run id
    losses = dict(wandb_history(cli.folder / "run", "loss"))
    expected = {row["step"]: row["loss"] for row in cli.rows("run")}
    assert {step: pytest.approx(loss) for step, loss in losses.items()} == expected
    assert wandb_history(cli.folder / "run", "eval/loss")
