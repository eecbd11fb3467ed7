"""Programs that a model wrote, by the tests that they pass.

A test is a text (`assert f(2) == 4`), run beside the program, or {"stdin", "stdout"}: the program is run with that
input, and its output is compared line by line, without white space at the ends of lines.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from drivetrain.conf.errors import DataError
from drivetrain.conf.rewards import CodeReward, Share
from drivetrain.train.rl.extract import last_block
from drivetrain.train.rl.rewards import UNSCORED, Sample
from drivetrain.train.rl.sandbox import Limits, Status, describe, run

# A test counts by a word that the program is not told, so neither an early end nor what it prints is a pass.
_HARNESS = """\
import os, sys, types
def tests():
    word, setup, tests = eval(sys.stdin.read())
    told = os.dup(1)
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    try:
        for name in (setup, open("solution.py", encoding="utf-8").read()):
            exec(compile(name, "solution.py", "exec"), solution.__dict__)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    for number, test in enumerate(tests):
        try:
            exec(compile(test, f"test {number}", "exec"), solution.__dict__)
        except BaseException as error:
            print(f"test {number}: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            os.write(told, f"\\n{word} {number}\\n".encode())
    os._exit(0)
tests()
"""


class Programs:
    """The share of `reference["tests"]` that the last fenced block passes; `reference["setup"]` is run before it.

    Raises:
        ConfigError: code cannot be shut in on this machine.
    """

    def __init__(self, config: CodeReward) -> None:
        self.config, self.limits = config, Limits.of(config.sandbox)
        describe(config.sandbox.walls)
        cores = len(os.sched_getaffinity(0))
        self.pool = ThreadPoolExecutor(config.workers or cores, "program")

    def score(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {"code": list(self.pool.map(self._one, samples))}

    def close(self) -> None:
        self.pool.shutdown()

    def _one(self, sample: Sample) -> float:
        tests = sample.reference.get("tests")
        if not tests:
            return UNSCORED
        texts, runs = _sorted(tests)
        code = last_block(sample.completion)
        if code is None:
            return 0.0
        setup = str(sample.reference.get("setup", ""))
        passed = self._beside(code, setup, texts) + sum(self._alone(code, each) for each in runs)
        if self.config.give is Share.all:
            return float(passed == len(tests))
        return passed / len(tests)

    def _beside(self, code: str, setup: str, texts: list[str]) -> int:
        """All in one process: a test that hangs or ends it takes those after it along."""
        if not texts:
            return 0
        word = secrets.token_hex(16)
        result = self._run(_HARNESS, repr((word, setup, texts)), {"solution.py": code})
        passed = {f"{word} {number}" for number in range(len(texts))}
        return len(passed.intersection(result.stdout.splitlines()))

    def _alone(self, code: str, test: Mapping[str, Any]) -> bool:
        result = self._run(code, str(test["stdin"]), {})
        return result.status is Status.ok and _lines(result.stdout) == _lines(str(test["stdout"]))

    def _run(self, code: str, stdin: str, files: dict[str, str]) -> Any:
        sandbox = self.config.sandbox
        return run(
            code, stdin=stdin, files=files, limits=self.limits, walls=sandbox.walls, packages=sandbox.packages
        )


def _sorted(tests: Any) -> tuple[list[str], list[Mapping[str, Any]]]:
    texts = [test for test in tests if isinstance(test, str)] if isinstance(tests, list | tuple) else []
    runs = [test for test in tests if isinstance(test, Mapping) and {"stdin", "stdout"} <= test.keys()]
    if len(texts) + len(runs) != len(tests):
        raise DataError('a sample\'s tests are not a list of texts and of {"stdin", "stdout"}; correct them')
    return texts, runs


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
