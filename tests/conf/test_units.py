import pytest

from drivetrain.conf.units import human_bytes


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "–"),
        (512, "512 B"),
        (1024, "1.0 KiB"),
        (2**20 * 1.5, "1.5 MiB"),
        (150 * 2**30, "150 GiB"),
        (2**50, "1.0 PiB"),
    ],
)
def test_bytes_for_people(number: float, text: str) -> None:
    assert human_bytes(number) == text
