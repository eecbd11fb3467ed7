"""Servers as samplers, against one that answers as vLLM does, and as others do."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from drivetrain.conf.errors import ConfigError, DrivetrainError
from drivetrain.conf.rollout import ServerConfig
from drivetrain.conf.schema import ModelConfig
from drivetrain.data.tokenizer import load_tokenizer, train_tokenizer
from drivetrain.model.generate import Request, Sampling
from drivetrain.model.hf import fill_from_hf
from drivetrain.model.initialize import initialize
from drivetrain.model.transformer import Transformer, build_model, unique_parameters
from drivetrain.train.mesh import World
from drivetrain.train.rl.episodes import Trajectory
from drivetrain.train.rl.samplers import send
from drivetrain.train.rl.samplers.server import Server, VllmServer

END = 258
Reply = tuple[int, Any]
ASKED = Request([5, 6, 7], Sampling(max_tokens=9, temperature=1.0, seed=11), 2)
CFG = ModelConfig(
    name="small",
    vocab_size=40,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=64,
)


class Fake:
    """`answer(number of the request, path, body)` says what it replies."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer: Callable[[int, str, dict[str, Any]], Reply] = lambda number, path, body: (200, {})
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.asked.append((self.path, body))
                    number = len(fake.asked)
                status, reply = fake.answer(number, self.path, body)
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


def choice(index: int, reason: str = "stop", text: str = "ab", **more: Any) -> dict[str, Any]:
    return {"index": index, "finish_reason": reason, "text": text, "logprobs": None, **more}


def drawn(index: int, tokens: list[int], logprobs: list[float | None]) -> dict[str, Any]:
    """As vLLM answers where it is asked for token ids."""
    spelled = {
        "tokens": [str(t) for t in tokens],
        "token_logprobs": logprobs,
        "text_offset": [],
        "top_logprobs": None,
    }
    return choice(index, token_ids=tokens, logprobs=spelled)


def completion(*choices: dict[str, Any]) -> Reply:
    return 200, {"id": "a", "object": "text_completion", "created": 0, "model": "m", "choices": list(choices)}


def server(fake: Fake, tokenizer: Tokenizer, retries: int = 1, seconds: float = 20, **words: Any) -> Server:
    cfg = ServerConfig(urls=["http://127.0.0.1:1/v1", fake.url], model="m", **words)
    return Server(cfg, tokenizer, [0, END], 3, seconds, retries)  # rank 3 asks the second of two


def test_a_request_in_vllms_words(fake: Fake, tokenizer: Tokenizer) -> None:
    fake.answer = lambda *_: completion(drawn(1, [8, END], [-0.5, -0.25]), drawn(0, [9], [None]))
    made = server(fake, tokenizer)
    ((first, second),) = made.generate([ASKED])
    assert first and second
    assert second.tokens == [8, END] and second.behaviour_logprobs == [-0.5, -0.25] and second.versions == []
    assert first.tokens == [9] and math.isnan(first.behaviour_logprobs[0])
    path, body = fake.asked[0]
    assert path == "/v1/completions"
    assert body == {
        "model": "m",
        "prompt": [5, 6, 7],
        "max_tokens": 9,
        "temperature": 1.0,
        "top_p": 1.0,
        "n": 2,
        "seed": 11,
        "logprobs": 0,
        "return_token_ids": True,
        "stop_token_ids": [0, END],
        "skip_special_tokens": False,
    }
    made.close()


def test_log_probabilities_before_the_temperature_are_not_taken(fake: Fake, tokenizer: Tokenizer) -> None:
    fake.answer = lambda *_: completion(drawn(0, [8], [-0.5]))
    for sampling in (Sampling(temperature=0.7), Sampling(top_p=0.9), Sampling(top_k=3, stop=("</a>",))):
        ((one,),) = server(fake, tokenizer).generate([Request([5], sampling)])
        assert one and one.logprobs == [-0.5] and math.isnan(one.behaviour_logprobs[0])
    assert fake.asked[-1][1]["top_k"] == 3 and fake.asked[-1][1]["stop"] == ["</a>"]


def test_a_text_is_tokenised_once(fake: Fake, tokenizer: Tokenizer) -> None:
    fake.answer = lambda *_: completion(choice(0), choice(1, "length", "the cat"))
    made = server(fake, tokenizer, token_ids=False)
    ((first, second),) = made.generate([ASKED])
    assert first and second
    assert first.tokens == [*tokenizer.encode("ab").ids, END] and first.finish_reason == "stop"
    assert second.tokens == tokenizer.encode("the cat").ids and second.finish_reason == "length"
    assert all(map(math.isnan, first.behaviour_logprobs + second.behaviour_logprobs))
    assert {"return_token_ids", "stop_token_ids", "logprobs"}.isdisjoint(fake.asked[0][1])
    assert fake.asked[0][1]["stop"] == [tokenizer.id_to_token(0), tokenizer.id_to_token(END)]
    with pytest.raises(ConfigError, match="does not tell which text or token ended a completion"):
        made.generate([Request([5], Sampling(stop=("</a>",)))])


def test_what_fails_is_tried_again_and_then_given_up(
    fake: Fake, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.answer = lambda number, *_: (503, {}) if number == 1 else completion(drawn(0, [8], [-0.5]))
    ((one,),) = server(fake, tokenizer).generate([Request([5])])
    assert one and one.tokens == [8]
    fake.answer = lambda number, path, body: (
        (500, {}) if body["prompt"] == [6] else completion(drawn(0, [8], [-0.5]), drawn(1, [8], [-0.5]))
    )
    found = server(fake, tokenizer).generate([Request([5], samples=2), Request([6], samples=2)])
    assert found[1] == [None, None] and found[0][0] is not None
    assert sum(body["prompt"] == [6] for _, body in fake.asked) == 2
    assert "did not complete a prompt: InternalServerError" in capfd.readouterr().err


def test_a_server_that_never_answers_is_given_up(fake: Fake, tokenizer: Tokenizer) -> None:
    never = threading.Event()
    fake.answer = lambda *_: (200, never.wait(20))
    assert server(fake, tokenizer, retries=0, seconds=0.3).generate([ASKED]) == [[None, None]]
    never.set()


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((404, {"error": {"message": "no model m"}}), "refuses a request with status 404: .*no model m"),
        (completion(choice(0), choice(1)), "gives no token ids; use vLLM 0.10.2 or newer, or stage.rollout"),
    ],
)
def test_what_a_user_has_to_mend_ends_the_run(
    fake: Fake, tokenizer: Tokenizer, reply: Reply, said: str
) -> None:
    fake.answer = lambda *_: reply
    with pytest.raises(ConfigError, match=said):
        server(fake, tokenizer).generate([ASKED])


class Weights:
    """As much of an engine as gives its weights."""

    def __init__(self, seed: int) -> None:
        self.model = built()
        initialize(self.model, CFG, seed)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, each.detach()) for name, each in unique_parameters(self.model))


def built() -> Transformer:
    model = build_model(CFG, "sdpa")
    model.materialize(torch.device("cpu"))
    return model


def follower(fake: Fake, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> VllmServer:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    world = World(0, 1, 0, torch.device("cpu"))
    cfg = ServerConfig(urls=[fake.url], model="m")
    arguments = cfg, tokenizer, [0, END], 0, 20.0, 0
    return VllmServer(*arguments, folder=folder, model=CFG, dtype=torch.float32, world=world)


def test_a_vllm_server_is_sent_the_weights(
    fake: Fake, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused, loaded from files that hold the very weights, and resumed; old files are removed."""
    loaded = built()

    def answer(number: int, path: str, body: dict[str, Any]) -> Reply:
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            fill_from_hf(loaded, CFG, Path(body["kwargs"]["weights_path"]))
        return completion(drawn(0, [8, END], [-0.5, -0.25])) if path == "/v1/completions" else (200, {})

    fake.answer = answer
    made = follower(fake, tokenizer, tmp_path / "sent", monkeypatch)
    for version in (0, 3):
        monkeypatch.setattr(send, "FILE_BYTES", 5000 if version else 1 << 30)  # several files the second time
        weights = Weights(version)
        made.sync(weights, version)  # type: ignore[arg-type]
        for (name, mine), (_, theirs) in zip(unique_parameters(loaded), weights.full_weights(), strict=True):
            assert torch.equal(mine, theirs), name
        assert [path.name for path in (tmp_path / "sent").iterdir()] == [f"version_{version:08}"]
    order = ["/pause?mode=keep", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert [path for path, _ in fake.asked] == 2 * order
    ((one,),) = made.generate([Request([5], Sampling(temperature=0.5))])
    assert one and one.versions == [3, 3] and one.behaviour_logprobs == [-0.5, -0.25]
    ((one,),) = made.generate([Request([5], Sampling(top_p=0.5))])  # of what share of all tokens, is not told
    assert one and all(map(math.isnan, Trajectory.of(one).behaviour_logprobs))


def test_a_server_that_takes_no_weights_is_resumed(
    fake: Fake, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answer = lambda number, path, body: (404 if path == "/collective_rpc" else 200, {})
    made = follower(fake, tokenizer, tmp_path / "sent", monkeypatch)
    with pytest.raises(DrivetrainError, match="started with VLLM_SERVER_DEV_MODE=1"):
        made.sync(Weights(0), 0)  # type: ignore[arg-type]
    assert fake.asked[-1][0] == "/resume"


def test_what_fails_for_a_moment_does_not_keep_the_weights_away(
    fake: Fake, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answer = lambda number, path, body: (503 if number == 2 else 200, {})
    made = follower(fake, tokenizer, tmp_path / "sent", monkeypatch)
    made.retries = 1
    made.sync(Weights(0), 0)  # type: ignore[arg-type]
    reload = ["/collective_rpc"] * 2
    assert [path for path, _ in fake.asked] == [
        "/pause?mode=keep",
        *reload,
        "/reset_prefix_cache",
        "/resume",
    ]


def test_a_run_learns_from_a_frozen_model(
    fake: Fake, small: list[str], tmp_path: Path, run_ranks: Callable[..., dict[str, Any]]
) -> None:
    """Its completions have no log-probabilities, and one prompt has no completions."""
    (tmp_path / "a.txt").write_text(
        " State the final answer to the following arithmetic problem: 1234567890" * 30
    )
    train_tokenizer([tmp_path / "a.txt"], 280, tmp_path / "tokenizer")
    refused: list[list[int]] = []

    def answer(number: int, path: str, body: dict[str, Any]) -> Reply:
        with fake.lock:
            refused.append(body["prompt"]) if not refused else None
        if body["prompt"] == refused[0]:
            return 500, {}
        return completion(*(drawn(i, [70 + i, 80, 0], [None, None, None]) for i in range(body["n"])))

    fake.answer = answer
    general = [word for word in small if not word.startswith(("stage.seq_len", "stage.tokens"))]
    words = ["stage=grpo", *general, "model.vocab_size=280", "model.max_seq_len=256", "stage.seq_len=192"]
    words += ["stage.prompts_per_step=2", "stage.group_size=3", "stage.max_completion=8", "stage.steps=9"]
    words += ["stage.micro_batch=2", "stage.eval_problems=2", "stage.rewards.custom.weight=1"]
    words += ["stage.rewards.custom.target=grpo_worker:reward", "stage.rollout.engine=endpoint"]
    words += [f"stage.rollout.server.urls=[{fake.url}]", "stage.rollout.server.model=m"]
    words += ["stage.rollout.retries=0", "stage.rollout.max_staleness=1"]
    case = {"name": "frozen", "overrides": words, "steps": 2, "run_dir": str(tmp_path)}
    found = run_ranks(Path(__file__).with_name("grpo_worker.py"), 1, [case])["frozen"]
    assert sum(row["rl/dropped"] for row in found["rows"]) == 3
    for row in found["rows"]:
        assert len(row["prompts"]) == 2 and row["rl/completion_tokens_mean"] == 3
        assert row["rl/importance"] == 1 and row["rl/gap_max"] == 0
        assert "rl/staleness" not in row  # its model has no age
        assert row["norm"] > 0
    assert (
        0 <= found["eval"]["eval/accuracy"] <= 1
    )  # by the model that is trained: the server has no part in it
