"""Whether a job can run on this machine; GPUs are made up, since the answer must not depend on who asks."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.schema import RunConfig
from drivetrain.launch import fit
from drivetrain.launch.fit import Gpu, check_machine, plan_here

H100 = Gpu("NVIDIA H100 80GB HBM3", 85 * 10**9)
ONLINE = ["tracker=wandb", "tracker.mode=online"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Gpu]:
    """Those of this machine; none yet, and no key for W&B."""
    found: list[Gpu] = []
    monkeypatch.setattr(fit, "local_gpus", lambda: tuple(found))
    return found


def test_cuda_needs_a_gpu(gpus: list[Gpu]) -> None:
    config = compose(["cluster.device=cuda"])
    with pytest.raises(ConfigError, match=r"torch sees no GPU here; use cluster.device=cpu"):
        check_machine(config)
    gpus.append(H100)
    check_machine(config)


def test_every_rank_has_a_gpu_of_its_own(gpus: list[Gpu]) -> None:
    check_machine(compose(["cluster.nproc=64"]))  # on the CPU they share
    gpus += [H100, H100]
    check_machine(compose(["cluster.nproc=2"]))
    check_machine(compose(["cluster.nproc=3", "cluster.device=cpu"]))
    with pytest.raises(ConfigError) as caught:
        check_machine(compose(["cluster.nproc=3"]))
    assert str(caught.value) == (
        "cluster.nproc=3 and this machine has 2 GPUs; use cluster.nproc=2, or cluster.device=cpu"
    )


def test_online_needs_a_key(gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"tracker.mode=online needs a W&B key and this machine has none"):
        check_machine(compose(ONLINE))
    check_machine(compose(["tracker=wandb"]))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_machine(compose(ONLINE))


def test_nothing_is_asked_of_other_machines(gpus: list[Gpu]) -> None:
    check_machine(compose(["cluster=torchrun", "cluster.device=cuda", "cluster.nproc=8", *ONLINE]))


def test_a_plan_on_the_cpu_goes_by_free_memory(gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 8 * 2**30

    monkeypatch.setattr(fit.psutil, "virtual_memory", Memory)
    line, fits = plan_here(compose(["cluster.nproc=4"]))
    assert fits and line.startswith("plan: a rank needs about ")
    assert line.endswith("of the 2.0 GiB that are free for it")
    Memory.available = 2**20
    line, fits = plan_here(compose(["cluster.nproc=4"]))
    assert not fits and line.endswith("that are free for it; use a smaller stage.micro_batch or model")


def llama(*more: str) -> RunConfig:
    words = ["model=llama3_8b", "cluster.nproc=8", "stage.seq_len=8192", "stage.tokens_per_step=524288"]
    return compose([*words, *more])


def test_a_plan_on_gpus(gpus: list[Gpu]) -> None:
    gpus += [H100] * 8
    line, fits = plan_here(llama())
    assert fits and "of 79.2 GiB on NVIDIA H100 80GB HBM3" in line and "at 40% MFU" in line
    line, fits = plan_here(llama("stage.micro_batch=8"))
    assert not fits and line.endswith(" makes it fit")


def test_the_smallest_gpu_that_is_used_decides(gpus: list[Gpu]) -> None:
    gpus += [H100] * 7 + [Gpu("NVIDIA A10", 24 * 10**9), Gpu("NVIDIA A10", 1)]
    line, fits = plan_here(llama())
    assert not fits and "of 22.4 GiB on NVIDIA A10" in line


def test_an_unknown_gpu_has_memory_and_no_speed(gpus: list[Gpu]) -> None:
    gpus.append(Gpu("Wunderkarte", 80 * 10**9))
    line, fits = plan_here(compose([]))
    assert fits and line.endswith("on Wunderkarte")


def test_only_what_is_certain_is_refused(gpus: list[Gpu]) -> None:
    """Moments and fp32 masters are exact; activations are an estimate."""
    gpus.append(H100)
    with pytest.raises(ConfigError, match=r"^weights, moments and gradients take 122 GiB on each rank"):
        plan_here(llama("cluster.nproc=1"))
    gpus[0] = Gpu("NVIDIA H100", 60 * 10**6)  # 2.2 million parameters fit, what 64 sequences leave does not
    line, fits = plan_here(compose(["stage.micro_batch=64"]))
    assert not fits and "MFU" in line


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_refused_where_the_whole_model_does_not_fit(stage: int, gpus: list[Gpu]) -> None:
    """Its parts would: 70B parameters over 64 ranks, and 8B over 8 GPUs of 30 GB."""
    gpus += [Gpu("NVIDIA Small", 30 * 10**9)] * 8
    plan_here(llama("stage.micro_batch=1", "engine.checkpointing=block"))
    with pytest.raises(ConfigError) as caught:
        plan_here(llama("engine=zero", f"engine.zero_stage={stage}", "engine.offload=true"))
    assert str(caught.value) == (
        "NVIDIA Small has 27.9 GiB and each rank begins with 29.9 GiB of weights; engine=zero builds the whole "
        "model on every rank before it divides it: use engine=fsdp"
    )
    large = [
        "model=llama3_70b",
        "cluster=torchrun",
        "cluster.nodes=8",
        "cluster.nproc=8",
        "stage.seq_len=8192",
    ]
    large += ["stage.tokens_per_step=524288", "engine.checkpointing=block"]
    assert plan_here(compose(large))[1]
    assert not plan_here(compose([*large, "engine=zero", f"engine.zero_stage={stage}"]))[1]


def test_a_plan_for_other_machines_goes_by_the_data_sheet(gpus: list[Gpu]) -> None:
    gpus.append(Gpu("NVIDIA A10", 1))
    line, fits = plan_here(llama("cluster=torchrun"))
    assert fits and line.endswith("on GPUs of 80 GB (H100 SXM)")


class TestLocalGpus:
    """`local_gpus` itself, which asks torch in another process."""

    @pytest.fixture(autouse=True)
    def _afresh(self) -> Iterator[None]:
        fit.local_gpus.cache_clear()
        yield
        fit.local_gpus.cache_clear()

    def test_without_a_device_nothing_is_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fit, "GPU_NODES", ("/nowhere",))
        monkeypatch.setattr(subprocess, "run", None)
        assert fit.local_gpus() == ()

    def test_torch_is_asked_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A stand-in for torch that knows two GPUs, found first by the process that asks."""
        monkeypatch.setattr(fit, "GPU_NODES", ("/dev/null",))
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(
            "from types import SimpleNamespace as Space\n"
            "get = lambda number: Space(name=f'GPU {number}', total_memory=10 + number)\n"
            "cuda = Space(get_device_properties=get, device_count=lambda: 2)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert fit.local_gpus() == (Gpu("GPU 0", 10), Gpu("GPU 1", 11))
        monkeypatch.setattr(subprocess, "run", None)
        assert len(fit.local_gpus()) == 2

    def test_a_torch_that_fails_sees_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(fit, "GPU_NODES", ("/dev/null",))
        (tmp_path / "torch.py").write_text("raise OSError('libcuda')\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert fit.local_gpus() == ()
