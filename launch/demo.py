"""Real text that every machine has: the sources and docstrings of Python's standard library, as JSONL."""

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Installed packages are not the standard library; its test data is mostly generated tables and byte soup.
LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
    "encodings",
}


def sources() -> Iterator[tuple[str, str]]:
    """(path inside the library, text), in sorted order; files that are not UTF-8 are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if LEFT_OUT.isdisjoint(inside.parts):
            try:
                yield str(inside), path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def main() -> None:
    """Write `OUT`, one document a line."""
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for name, text in sources():
            file.write(json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
