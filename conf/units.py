"""Numbers for people."""

import math


def human_bytes(number: float) -> str:
    """Bytes for people: three digits and a binary unit; a dash for none."""
    if number < 1:
        return "–"
    power = min(5, int(math.log2(number)) // 10)
    scaled = number / 1024**power
    unit = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")[power]
    return f"{scaled:,.0f} {unit}" if power == 0 or scaled >= 100 else f"{scaled:.1f} {unit}"
