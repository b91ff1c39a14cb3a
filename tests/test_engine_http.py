"""HTTPEngine against a scripted server: requests, streaming, retries and error messages."""

import contextlib
import gc
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, tiny_llama

from thor.data import load_problems
from thor.engines import HTTPEngine, Request, RequestRejected, ServerError, http, load_engine
from thor.engines.vllm import vllm_seed
from thor.rollout import Sampling, solve
from thor.text import FenceParser

ROOT = Path(__file__).parent.parent
END = 256  # <|end|> of the byte-level tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_token_id == END
    tiny_llama(tokenizer).config.save_pretrained(folder)  # the client needs no weights
    tokenizer.save_pretrained(folder)
    return folder


class Server:
    """Serves /v1/models and completions.

    answer: function(body, reply) that sends chunks through `reply`, the request handler. It may return an error status.
    """

    def __init__(self, root: Path, answer=None) -> None:
        self.models = [{"id": "tiny", "root": str(root), "max_model_len": 64}]
        self.answer = answer
        self.bodies: list[dict] = []
        self.sent: list[int] = []  # tokens of all requests
        self.open = self.most_open = 0
        self.connections: set = set()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None: ...

            def handle(self) -> None:
                with contextlib.suppress(ConnectionResetError):  # the client closed the connection early
                    super().handle()

            def reply(self, status: int, value) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.reply(200, {"data": server.models})

            def chunk(self, data: bytes) -> None:
                parts = [data[i : i + 7] for i in range(0, len(data), 7)]  # splits lines between chunks
                self.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts))
                self.wfile.flush()

            def send(self, token_ids, logps=None, **extra) -> None:
                logprobs = None if logps is None else {"token_logprobs": logps}
                choice = {"index": 0, "text": "", "token_ids": token_ids, "logprobs": logprobs, **extra}
                self.event({"choices": [choice]})
                server.sent += token_ids or []

            def event(self, value) -> None:
                if not self.headers_sent:
                    self.send_response(200)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    self.headers_sent = True
                self.chunk(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())  # like vLLM

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.headers_sent = False
                with lock:
                    server.bodies.append(body)
                    server.connections.add(self.client_address)
                    server.open += 1
                    server.most_open = max(server.most_open, server.open)
                try:
                    status = server.answer(body, self)
                    if status:
                        self.reply(status, {"error": {"message": "the server\nis broken", "code": status}})
                    elif self.headers_sent:
                        self.chunk(b"data: [DONE]\n\n")
                        self.wfile.write(b"0\r\n\r\n")
                except OSError:  # the client closed the connection
                    self.close_connection = True
                finally:
                    with lock:
                        server.open -= 1

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(model, monkeypatch):
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    server = Server(model)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def connect(server):
    """Creates engines for the server, and closes them after the test."""
    with contextlib.ExitStack() as engines:
        yield lambda rest="", **options: engines.enter_context(
            contextlib.closing(HTTPEngine(server.url + rest, **options))
        )


def complete_in_time(engine, requests: list[Request]) -> dict:
    for request in requests:
        engine.add(request)
    done, deadline = {}, time.monotonic() + 60
    while engine.has_work():
        assert time.monotonic() < deadline
        done.update({c.id: c for c in engine.step()})
    return done


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def answer_on_event(server) -> threading.Event:
    """Make the server answer with END once the returned event is set."""
    event = threading.Event()

    def answer(body, reply):
        event.wait(30)
        reply.send([END], [-0.1])

    server.answer = answer
    return event


def send_until_closed(reply, closed: threading.Event) -> None:
    """Send tokens until the client closes the connection, for half a minute at most. Then set the event."""
    try:
        for _ in range(6000):
            reply.send([65], [-0.1])
            time.sleep(0.005)
    except OSError:
        closed.set()
        raise


def encode_text(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False)


# ---- requests and streams -------------------------------------------------------------------------------------------


def test_request_and_response_are_token_ids(server, connect):
    def answer(body, reply):
        reply.send([5], [-0.5])
        reply.send([6, 7], [-0.25, None])
        reply.event({"choices": []})  # a usage report
        reply.send([])
        reply.send([END], [-1.0], finish_reason="stop")

    server.answer = answer
    engine = connect("/v1/", rows=4)
    assert engine.context == 64 and not engine.reproducible and engine.eos == {END} and engine.model == "tiny"
    request = Request("a", [1, 2, 3], 9, temperature=0.7, top_p=0.9, top_k=20, seed=2**64 - 1)
    done = complete_in_time(engine, [request])["a"]
    assert done.token_ids == [5, 6, 7, END] and done.finish == "eos"
    assert done.logps[:2] == [-0.5, -0.25] and np.isnan(done.logps[2]) and done.logps[3] == -1.0
    [body] = server.bodies
    assert {k: body[k] for k in ("model", "prompt", "max_tokens", "temperature", "top_p", "top_k")} == {
        "model": "tiny",
        "prompt": [1, 2, 3],
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
    }
    assert body["seed"] == 2**63 - 1 and body["return_token_ids"] and body["stream"] and body["logprobs"] == 0
    assert body["repetition_penalty"] == 1.0  # not the value in generation_config.json


def test_line_separators_inside_the_text(server, connect):
    """vLLM does not escape them in JSON, and `str.splitlines` would split at them."""

    def answer(body, reply):
        for i, character in enumerate("\u2028\u2029\x85"):
            reply.send([i], [-0.5], text=f"a{character}b")

    server.answer = answer
    done = complete_in_time(connect(), [Request("a", [1], 3)])["a"]
    assert done.token_ids == [0, 1, 2] and len(server.bodies) == 1


def test_vllm_seed_fits_a_signed_integer():
    assert vllm_seed(-1) >= 0
    for seed, expected in ((0, 0), (2**63 - 1, 2**63 - 1), (2**64 - 2, 2**63 - 2)):
        assert vllm_seed(seed) == expected


def test_stop_rule_ends_the_completion_and_the_stream(server, connect):
    block, closed = encode_text("\n```python\nprint(1)\n```"), threading.Event()

    def answer(body, reply):
        for token in block[:-1]:
            reply.send([token], [-0.1])
        reply.send([block[-1], 65], [-0.1, -0.1])  # the block ends inside a chunk
        send_until_closed(reply, closed)

    server.answer = answer
    engine = connect()
    request = Request("a", [1], 60, stop=FenceParser())
    done = complete_in_time(engine, [request])["a"]
    assert done.finish == "stop" and done.token_ids == block and request.stop.closed
    assert len(done.logps) == len(done.token_ids)
    assert closed.wait(10)


def test_length_limit_ends_the_completion_and_keeps_the_connection(server, connect):
    def answer(body, reply):
        for i in range(body["max_tokens"]):
            reply.send([i], [-0.1])

    server.answer = answer
    engine = connect(rows=1)
    for n in (3, 5):
        done = complete_in_time(engine, [Request("a", [1], n)])["a"]
        assert done.finish == "length" and done.token_ids == list(range(n))
    assert complete_in_time(engine, [Request("a", [1] * 62, 9)])["a"].token_ids == [0, 1]  # room for two tokens
    assert len(server.connections) == 1
    for wrong in ([], [1] * 64):
        with pytest.raises(ValueError, match="request a has"):
            engine.add(Request("a", wrong, 4))
    with pytest.raises(ValueError, match="request a: max_tokens must be at least 1"):
        engine.add(Request("a", [1], 0))
    assert not engine.has_work()


@pytest.mark.parametrize("finish", ["eos", "length"])
def test_server_that_hangs_after_the_last_token_delays_no_request(server, connect, monkeypatch, finish):
    monkeypatch.setattr(http, "DRAIN_TIMEOUT", 0.1)
    event, delayed = threading.Event(), []

    def answer(body, reply):
        reply.send([5, END if finish == "eos" else 6], [-0.1, -0.2])
        delayed.append(not event.wait(30))

    server.answer = answer
    engine = connect(rows=1)
    for name in "ab":  # with one row, the second needs the connection of the first
        done = complete_in_time(engine, [Request(name, [1], 9 if finish == "eos" else 2)])[name]
        assert len(done.token_ids) == 2 and done.finish == finish
    assert len(server.bodies) == 2 and not delayed
    event.set()


def test_at_most_rows_requests_are_in_flight(server, connect):
    def answer(body, reply):
        time.sleep(0.05)
        reply.send([*body["prompt"], END], [-0.1] * (1 + len(body["prompt"])))

    server.answer = answer
    engine = connect(rows=5)
    done = complete_in_time(engine, [Request(str(i), [i], 9) for i in range(20)])
    assert {int(i): c.token_ids for i, c in done.items()} == {i: [i, END] for i in range(20)}
    assert 2 <= server.most_open <= 5


def test_step_returns_without_completions(server, connect):
    event, engine = answer_on_event(server), connect()
    engine.add(Request("a", [1], 4))
    assert engine.step() == [] and engine.has_work()
    event.set()
    assert complete_in_time(engine, [])["a"].finish == "eos"


def test_drop_aborts_all_requests(server, connect):
    """One request is finished, one is being sampled and one waits for a connection. The server notices the abort."""
    closed = threading.Event()

    def answer(body, reply):
        if body["prompt"] == [1]:
            send_until_closed(reply, closed)
        reply.send(body["prompt"], [-0.1])

    server.answer = answer
    engine = connect(rows=1)
    engine.add(Request("finished", [7], 1))
    wait_until(lambda: not engine.finished.empty())
    engine.add(Request("a", [1], 63))
    wait_until(lambda: len(server.sent) >= 3)
    engine.add(Request("waits", [1], 63))
    engine.drop()
    assert not engine.has_work() and engine.step() == []
    assert closed.wait(10)
    done = complete_in_time(engine, [Request(name, [3], 1) for name in ("a", "waits", "finished")])
    assert [c.token_ids for c in done.values()] == [[3]] * 3
    # the last dropped request may have been sent, if it got the connection before it was cancelled
    assert [body["prompt"] for body in server.bodies if body["prompt"] != [1]] == [[7], [3], [3], [3]]


def test_step_waits_only_if_called_in_a_tight_loop(server, connect):
    event, engine, waited = answer_on_event(server), connect(), []
    engine.add(Request("a", [1], 4))
    get = engine.finished.get
    engine.finished.get = lambda block=True, timeout=None: waited.append(block) or get(block, timeout)
    for _ in range(5):
        engine.step()
        time.sleep(0.01)  # the step of another engine
    assert waited == [False] * 5
    for _ in range(20):
        engine.step()
    assert any(waited)
    event.set()


def test_close_ends_connections_and_thread(server, connect, caplog, monkeypatch):
    """One request is being sampled, one waits for its retry, and one for a connection."""
    closed = threading.Event()

    def answer(body, reply):
        if body["prompt"] == [0]:
            return 500
        send_until_closed(reply, closed)

    server.answer = answer
    monkeypatch.setattr(http, "BACKOFF", 30.0)
    engine = connect(rows=1)
    for i in range(3):
        engine.add(Request(str(i), [i], 63))
    wait_until(lambda: len(server.sent) >= 3)
    start = time.monotonic()
    engine.close()
    assert not engine.has_work() and not engine.thread.is_alive() and closed.wait(10)
    assert time.monotonic() - start < 10 and [body["prompt"] for body in server.bodies].count([0]) == 1
    engine.close()
    gc.collect()
    assert not caplog.records  # asyncio would log pending tasks that are destroyed


# ---- errors and retries ---------------------------------------------------------------------------------------------


def test_failed_request_is_retried_from_its_start(server, connect):
    """After 429, 500, a broken stream and an error inside the stream. Each attempt uses a fresh stop rule and text."""
    block = encode_text("\n```python\nprint(2)\n```")

    def answer(body, reply):
        attempt = len(server.bodies)
        if attempt <= 2:
            return (429, 500)[attempt - 1]
        if attempt <= 4:
            reply.send(block[:-1], [-9.0] * (len(block) - 1))  # all of the block but its last token
            if attempt == 3:
                reply.wfile.write(b"broken")
                reply.connection.close()
                raise ConnectionResetError
            reply.event({"error": {"message": "engine died"}})
            return None
        reply.send(block, [-0.5] * len(block))

    server.answer = answer
    done = complete_in_time(connect(), [Request("a", [1], 60, seed=7, stop=FenceParser())])["a"]
    assert done.token_ids == block and done.logps == [-0.5] * len(block) and done.finish == "stop"
    assert len(server.bodies) == 5 and all(body == server.bodies[0] for body in server.bodies)


def test_stream_that_breaks_after_its_last_token_is_complete(server, connect):
    def answer(body, reply):
        reply.send([1, 2], [-0.1, -0.2])
        reply.wfile.write(b"broken")
        reply.connection.close()
        raise ConnectionResetError

    server.answer = answer
    done = complete_in_time(connect(), [Request("a", [1], 2)])["a"]
    assert done.token_ids == [1, 2] and done.finish == "length" and len(server.bodies) == 1


def test_undecodable_stream_is_a_server_error(server, connect, monkeypatch):
    def answer(body, reply):
        reply.send_response(200)
        reply.send_header("Content-Encoding", "gzip")
        reply.send_header("Content-Length", "5")
        reply.end_headers()
        reply.wfile.write(b"plain")

    server.answer = answer
    monkeypatch.setattr(http, "MAX_ATTEMPTS", 2)
    with pytest.raises(ServerError, match="failed 2 times, last with DecodingError"):
        complete_in_time(connect(), [Request("a", [1], 2)])


def test_a_rejected_request_leaves_the_others(server, connect):
    engine, done, rejected = connect(), [], []

    def answer(body, reply):
        if body["prompt"] == [2]:
            return 400
        return reply.send([5], [-0.1])

    server.answer = answer
    for name in range(1, 5):
        engine.add(Request(str(name), [name], 1))
    wait(engine.in_flight)  # all end before the first step
    while engine.has_work():
        try:
            done += [completion.id for completion in engine.step()]
        except RequestRejected as error:
            rejected.append(error.request_id)
    assert sorted(done) == ["1", "3", "4"] and rejected == ["2"]


def test_permanent_errors_are_one_line(server, connect, monkeypatch):
    engine = connect(timeout=0.2)
    monkeypatch.setattr(http, "MAX_ATTEMPTS", 2)

    def error_message(answer) -> str:
        server.answer = answer
        with pytest.raises(ServerError) as caught:
            complete_in_time(engine, [Request("a", [1], 4)])
        assert not engine.has_work() and str(caught.value).startswith(server.url) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "failed 2 times, last with 500: the server is broken" in error_message(lambda body, reply: 500)
    before = len(server.bodies)
    assert "rejected the request with 404: the server is broken" in error_message(lambda body, reply: 404)
    assert len(server.bodies) == before + 1  # not retried
    with pytest.raises(RequestRejected) as rejected:
        server.answer = lambda body, reply: 400
        complete_in_time(engine, [Request("a", [1], 4)])
    assert rejected.value.request_id == "a" and "with 400: the server is broken" in str(rejected.value)
    assert "no token ids" in error_message(lambda body, reply: reply.send(None))
    assert "the stream ended early" in error_message(lambda body, reply: reply.send([1], [-0.1]))
    monkeypatch.setattr(http, "MAX_ATTEMPTS", 3)
    before = len(server.bodies)
    assert "failed 2 times, last with ReadTimeout" in error_message(lambda body, reply: time.sleep(1))
    assert len(server.bodies) == before + 2
    server.http.shutdown()
    server.http.server_close()
    assert "ConnectError" in error_message(None)


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": None},
        {"choices": [None]},
        {"choices": 7},
        {},
        {"choices": [{"token_ids": [1]}]},
        {"choices": [{"token_ids": [1], "logprobs": None}]},
        {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": None}}]},
        {"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-0.1]}}]},
        {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": ["-0.1"]}}]},
        {"choices": [{"token_ids": ["1"], "logprobs": {"token_logprobs": [-0.1]}}]},
        {"choices": [{"token_ids": [1.5], "logprobs": {"token_logprobs": [-0.1]}}]},
        {"choices": [{"token_ids": [-1], "logprobs": {"token_logprobs": [-0.1]}}]},
        {"choices": [{"token_ids": [2**31], "logprobs": {"token_logprobs": [-0.1]}}]},
        {"choices": [{"token_ids": [2**40], "logprobs": {"token_logprobs": [-0.1]}}]},
        {"choices": [{"token_ids": [-1], "text": "\u2028", "logprobs": {"token_logprobs": [-0.1]}}]},
        {"choices": [{"token_ids": 1, "logprobs": {"token_logprobs": [-0.1]}}]},
        {"choices": [{"logprobs": {"token_logprobs": [-0.1]}}]},
    ],
)
def test_malformed_chunk_is_one_line(server, connect, chunk):
    server.answer = lambda body, reply: reply.event(chunk)
    with pytest.raises(ServerError, match="no token ids with log-probs") as caught:
        complete_in_time(connect(), [Request("a", [1], 4, stop=FenceParser())])
    assert len(str(caught.value).splitlines()) == 1 and len(server.bodies) == 1  # not retried


def test_error_without_a_message_is_one_line(server, connect, monkeypatch):
    monkeypatch.setattr(http, "MAX_ATTEMPTS", 1)
    for error in (None, {"message": None}, {"message": {"a": 1}}, "text"):
        server.answer = lambda body, reply, error=error: reply.event({"error": error})
        with pytest.raises(ServerError, match="failed 1 times"):
            complete_in_time(connect(), [Request("a", [1], 4)])


def test_unsuitable_server_is_rejected_at_once(server, connect):
    with pytest.raises(ServerError, match=f"{server.url}: serves tiny, not big$"):
        HTTPEngine(server.url + "#big")
    assert connect("#tiny").model == "tiny"
    server.models[0]["root"] = "/nowhere/at/all"
    with pytest.raises(ServerError, match="serves /nowhere/at/all, whose tokenizer is needed on this machine"):
        connect()
    server.models = [{"id": "tiny"}]
    with pytest.raises(ServerError, match="is it vLLM"):
        connect()
    server.models = {"x": 1}
    with pytest.raises(ServerError, match="not like `vllm serve`"):
        connect()
    for url in ("http://127.0.0.1:1", "http://127.0.0.1:port"):
        with pytest.raises(ServerError, match="is `vllm serve` running there"):
            HTTPEngine(url)


def test_log_probs_of_a_prompt(server, connect):
    entries = [None, {"7": {"logprob": -0.5, "rank": 1}}, {"9": {"logprob": -1.5}, "3": {"logprob": -0.1}}]
    server.answer = lambda body, reply: reply.reply(200, {"choices": [{"prompt_logprobs": entries}]})
    assert connect().log_probs([5, 7, 9]) == [-0.5, -1.5]
    assert server.bodies[-1] == {"model": "tiny", "prompt": [5, 7, 9], "max_tokens": 1, "prompt_logprobs": 0}
    for answer in (lambda body, reply: 500, lambda body, reply: reply.reply(200, {"choices": [{}]})):
        server.answer = answer
        with pytest.raises(ServerError, match=f"{server.url}: gave no log-probs of a prompt"):
            connect().log_probs([5, 7, 9])


def test_weights_of_a_server_cannot_be_updated(server, connect):
    engine = connect()
    with pytest.raises(RuntimeError, match="cannot update the weights of a server"):
        engine.update_weights([])
    engine.sleep()


# ---- use in scripts -------------------------------------------------------------------------------------------------


def test_load_engine_selects_the_engine_by_name(server, model):
    with contextlib.closing(load_engine(server.url, "auto", 4)) as engine:
        assert isinstance(engine, HTTPEngine)
    with pytest.raises(ValueError, match="--device cpu: vLLM chooses the device"):
        load_engine(server.url, "cpu", 4)
    with pytest.raises(RuntimeError, match="no weights"):
        load_engine(f"vllm:{model}", "auto", 4)


def test_trajectories_over_http(server, connect, executor):
    turns = ["Compute.\n```python\nprint(6 * 7)\n```", "\nIt is \\boxed{42}."]
    server.models[0]["max_model_len"] = 4096

    def answer(body, reply):
        answered = "42" in byte_tokenizer().decode(body["prompt"])
        tokens = encode_text(turns[answered]) + [END] * answered
        reply.send(tokens, [-0.1] * len(tokens))

    server.answer = answer
    engine = connect(rows=4)
    problems = load_problems("synthetic", split="train", limit=6, seed=0)
    for trajectory in solve(engine, executor, problems, Sampling(max_tokens=400)):
        text = trajectory.text(engine.tokenizer)
        assert text == turns[0] + "\n```output\n42\n```\n" + turns[1] and trajectory.finish == "stop"


def test_self_correction_over_http(server, connect, executor):
    """The request after a failed block ends with r_pre, token by token."""
    server.models[0]["max_model_len"] = 4096
    replies = iter(["Compute it.\n```python\nprint(x)\n```", "\n```python\nprint(42)\n```", "It is \\boxed{42}."])

    def answer(body, reply):
        text = next(replies)
        tokens = encode_text(text) + [END] * ("boxed" in text)
        reply.send(tokens, [-0.1] * len(tokens))

    server.answer = answer
    engine = connect(rows=4)
    [problem] = load_problems("synthetic", split="train", limit=1, seed=0)
    [t] = solve(engine, executor, [problem], Sampling(max_tokens=400), self_correct=1, suffix_tokens=5)
    kept = "Compute"  # the last five tokens of the thought are " it.\n"
    assert server.bodies[1]["prompt"] == t.prompt_ids + encode_text(kept)
    assert t.text(engine.tokenizer, policy_only=True).startswith(kept + "\n```python\nprint(42)\n```\nIt is")
    assert [step.retries for step in t.steps] == [1, 0] and t.corrections == 1
    assert t.discarded == len(" it.\n```python\nprint(x)\n```")
    assert t.num_sampled + t.discarded == len(server.sent)


@pytest.mark.parametrize("problem", ["down", "model", "broken"])
def test_script_reports_server_errors_in_one_line(server, tmp_path, problem):
    server.answer = lambda body, reply: 400
    url = {"down": "http://127.0.0.1:1", "model": f"{server.url}#big", "broken": server.url}[problem]
    rejected = "rejected the request with 400: the server is broken"
    expected = {"down": "no answer", "model": "not big", "broken": rejected}[problem]
    server.models[0]["max_model_len"] = 4096
    done = subprocess.run(
        [sys.executable, ROOT / "run_infer.py", "What is 2 + 2?", "--model", url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr, done.stderr
