"""Which operations a device runs, on a GPU that is made up."""

from types import SimpleNamespace

import pytest
import torch

from drivetrain.conf.compose import compose
from drivetrain.conf.errors import ConfigError
from drivetrain.conf.head_dim import LARGEST
from drivetrain.conf.schema import Device, Kernels, Precision
from drivetrain.kernels.attention_triton import MAX_HEAD_DIM
from drivetrain.model import backend
from drivetrain.model.backend import backend_for, backend_of
from drivetrain.model.memory import estimate

GPU, CPU = torch.device("cuda"), torch.device("cpu")
WIDTHS = [(64, "bf16", True), (256, "bf16", True), (264, "bf16", False), (100, "bf16", False)]
WIDTHS += [(128, "fp32", True), (136, "fp32", False), (256, "fp32", False)]


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = SimpleNamespace(find_spec=lambda name: object())
    monkeypatch.setattr(backend, "importlib", SimpleNamespace(util=found))


def test_the_widths_are_the_kernels_own() -> None:
    dtypes = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}
    assert {precision: MAX_HEAD_DIM[dtype] for precision, dtype in dtypes.items()} == LARGEST


@pytest.mark.parametrize(("head_dim", "precision", "taken"), WIDTHS)
def test_heads_that_the_kernels_do_not_take(head_dim: int, precision: str, taken: bool) -> None:
    config = compose([f"model.head_dim={head_dim}", f"engine.precision={precision}"])
    assert backend_for(config, GPU) == ("triton" if taken else "sdpa")
    assert backend_for(config, CPU) == "sdpa"
    for kernels in (Kernels.triton, Kernels.flash_attn):
        config.kernels = kernels
        if taken:
            assert backend_for(config, GPU) == kernels.name
            continue
        with pytest.raises(ConfigError) as caught:
            backend_for(config, GPU)
        assert str(caught.value) == (
            f"kernels={kernels.name} takes a model.head_dim that is a multiple of 8 up to "
            f"{LARGEST[Precision[precision]]} in {precision}, not {head_dim}; use kernels=sdpa"
        )


def test_without_a_width_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (backend_of(Kernels.auto, GPU), backend_of(Kernels.auto, CPU)) == ("triton", "sdpa")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend_of(Kernels.auto, GPU) == "sdpa"
    with pytest.raises(ConfigError, match=r"kernels=flash_attn needs sm80 or newer, this is sm75"):
        backend_of(Kernels.flash_attn, GPU)


@pytest.mark.parametrize(("head_dim", "precision", "taken"), WIDTHS)
def test_the_plan_knows_what_auto_becomes(head_dim: int, precision: str, taken: bool) -> None:
    words = [f"model.head_dim={head_dim}", f"engine.precision={precision}"]
    auto, sdpa = (estimate(compose([*words, *more]), 4, Device.cuda) for more in ([], ["kernels=sdpa"]))
    assert (auto == sdpa) is not taken
