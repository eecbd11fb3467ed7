"""One rank of a test: `rank.py WORKER.py CASES.json OUT.json`, with RANK and WORLD_SIZE as torchrun sets them.

WORKER.py has `run_case(case, world)`, which all ranks call for one case after the other in one process group.
OUT.json becomes {name of the case: what rank 0's call returned}.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch

from drivetrain.conf.schema import Device
from drivetrain.train.mesh import init_world, leave_world
from drivetrain.train.process import end_process


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses and torch.compile look modules up
    spec.loader.exec_module(module)
    return module


def main(worker: str, cases: str, out: str) -> None:
    torch.set_num_threads(1)
    run_case = load(worker).run_case
    world = init_world(Device.cpu, timeout_s=120)
    found = {case["name"]: run_case(case, world) for case in json.loads(Path(cases).read_text())}
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    leave_world()
    end_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
