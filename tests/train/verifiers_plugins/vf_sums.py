"""A local taskset: sums."""

import verifiers.v1 as vf

__all__ = ["Sums"]


class Data(vf.TaskData):
    answer: str = ""


class SumsConfig(vf.TasksetConfig):
    largest: int = 9


class Sum(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        messages = trace.branches[-1].messages if trace.branches else []
        said = [m.content or "" for m in messages if m.role == "assistant"]
        return float(bool(said) and said[-1].strip() == self.data.answer)

    @vf.reward
    async def short(self, trace: vf.Trace) -> float:
        return 0.25


class Sums(vf.Taskset[Sum, SumsConfig]):
    def load(self):
        for a in range(3):
            for b in range(1, self.config.largest):
                data = Data(prompt=f"{a} + {b}", system_prompt="Add.", answer=str(a + b))
                yield Sum(data, self.config.task)
