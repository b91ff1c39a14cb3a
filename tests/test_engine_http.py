"""HTTPEngine against a server that follows a script: what it sends, how it reads, and one line for each fault."""

import contextlib
import gc
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, tiny_llama

from thor.data import load_problems
from thor.engines import HTTPEngine, Request, ServerError, load_engine
from thor.engines import http as engine_http
from thor.engines.base import signed
from thor.rollout import Sampling, solve
from thor.text import FenceParser

ROOT = Path(__file__).parent.parent
END = 256  # <|end|> of the byte-level tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    assert tokenizer.eos_token_id == END
    tiny_llama(tokenizer).config.save_pretrained(folder)  # a server's client needs no weights
    tokenizer.save_pretrained(folder)
    return folder


class Server:
    """Serves /v1/models, and completions by `answer(body, send)`, which sends chunks and may raise a status (int)."""

    def __init__(self, root: Path, answer=None) -> None:
        self.models = [{"id": "tiny", "root": str(root), "max_model_len": 64}]
        self.answer = answer
        self.bodies: list[dict] = []
        self.sent: list[int] = []  # tokens, over all requests
        self.open = self.most_open = 0
        self.connections: set = set()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None: ...

            def handle(self) -> None:
                with contextlib.suppress(ConnectionResetError):  # the client left something unread
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
                parts = [data[i : i + 7] for i in range(0, len(data), 7)]  # a line need not arrive whole
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
                self.chunk(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())  # as vLLM writes it

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
                        self.reply(status, {"error": {"message": "the server\nis ill", "code": status}})
                    elif self.headers_sent:
                        self.chunk(b"data: [DONE]\n\n")
                        self.wfile.write(b"0\r\n\r\n")
                except OSError:  # the client has left
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
    monkeypatch.setattr(engine_http, "BACKOFF", 0.01)
    server = Server(model)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def connect(server):
    """Makes engines of the server, and closes them."""
    with contextlib.ExitStack() as engines:
        yield lambda rest="", **options: engines.enter_context(
            contextlib.closing(HTTPEngine(server.url + rest, **options))
        )


def complete(engine, requests: list[Request]) -> dict:
    for request in requests:
        engine.add(request)
    done, deadline = {}, time.monotonic() + 60
    while engine.has_work():
        assert time.monotonic() < deadline
        done.update({c.id: c for c in engine.step()})
    return done


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def hold(server) -> threading.Event:
    """Have the server answer with END, once the event is set."""
    go = threading.Event()

    def answer(body, reply):
        go.wait(30)
        reply.send([END], [-0.1])

    server.answer = answer
    return go


def send_on(reply, left: threading.Event) -> None:
    """Send until the client has left, or for half a minute."""
    try:
        for _ in range(6000):
            reply.send([65], [-0.1])
            time.sleep(0.005)
    except OSError:
        left.set()
        raise


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False)


# ---- what is sent and read ------------------------------------------------------------------------------------------


def test_ids_go_out_and_ids_come_back(server, connect):
    def answer(body, reply):
        reply.send([5], [-0.5])
        reply.send([6, 7], [-0.25, None])
        reply.event({"choices": []})  # a report of usage
        reply.send([])
        reply.send([END], [-1.0], finish_reason="stop")

    server.answer = answer
    engine = connect("/v1/", rows=4)
    assert engine.context == 64 and engine.eos == {END} and engine.model == "tiny"
    request = Request("a", [1, 2, 3], 9, temperature=0.7, top_p=0.9, top_k=20, seed=2**64 - 1)
    done = complete(engine, [request])["a"]
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
    assert body["repetition_penalty"] == 1.0  # else a server takes the one of generation_config.json


def test_line_separators_inside_the_text(server, connect):
    """vLLM's JSON holds them as they are; `str.splitlines` would end a line there."""

    def answer(body, reply):
        for i, character in enumerate("\u2028\u2029\x85"):
            reply.send([i], [-0.5], text=f"a{character}b")

    server.answer = answer
    done = complete(connect(), [Request("a", [1], 3)])["a"]
    assert done.token_ids == [0, 1, 2] and len(server.bodies) == 1


def test_seeds_fit_a_signed_integer():
    assert signed(0) == 0 and signed(2**63 - 1) == 2**63 - 1 and signed(2**64 - 2) == 2**63 - 2 and signed(-1) >= 0


def test_the_stop_rule_ends_the_turn_and_the_stream(server, connect):
    block, left = ids("\n```python\nprint(1)\n```"), threading.Event()

    def answer(body, reply):
        for token in block[:-1]:
            reply.send([token], [-0.1])
        reply.send([block[-1], 65], [-0.1, -0.1])  # the block closes inside a chunk
        send_on(reply, left)

    server.answer = answer
    engine = connect()
    request = Request("a", [1], 60, stop=FenceParser())
    done = complete(engine, [request])["a"]
    assert done.finish == "stop" and done.token_ids == block and request.stop.closed
    assert len(done.logps) == len(done.token_ids)
    assert left.wait(10)


def test_a_turn_ends_at_its_limit_and_the_connection_is_kept(server, connect):
    def answer(body, reply):
        for i in range(body["max_tokens"]):
            reply.send([i], [-0.1])

    server.answer = answer
    engine = connect(rows=1)
    for n in (3, 5):
        done = complete(engine, [Request("a", [1], n)])["a"]
        assert done.finish == "length" and done.token_ids == list(range(n))
    assert complete(engine, [Request("a", [1] * 62, 9)])["a"].token_ids == [0, 1]  # room for two tokens
    assert len(server.connections) == 1
    for wrong in ([], [1] * 64):
        with pytest.raises(ValueError, match="request a has"):
            engine.add(Request("a", wrong, 4))
    with pytest.raises(ValueError, match="request a wants max_tokens >= 1"):
        engine.add(Request("a", [1], 0))
    assert not engine.has_work()


@pytest.mark.parametrize("finish", ["eos", "length"])
def test_a_server_silent_after_the_last_token_holds_up_no_turn(server, connect, monkeypatch, finish):
    monkeypatch.setattr(engine_http, "DRAIN", 0.1)
    go, held_up = threading.Event(), []

    def answer(body, reply):
        reply.send([5, END if finish == "eos" else 6], [-0.1, -0.2])
        held_up.append(not go.wait(30))

    server.answer = answer
    engine = connect(rows=1)
    for name in "ab":  # the second one has the place of the first
        done = complete(engine, [Request(name, [1], 9 if finish == "eos" else 2)])[name]
        assert len(done.token_ids) == 2 and done.finish == finish
    assert len(server.bodies) == 2 and not held_up
    go.set()


def test_many_requests_are_in_flight_but_no_more_than_rows(server, connect):
    def answer(body, reply):
        time.sleep(0.05)
        reply.send([*body["prompt"], END], [-0.1] * (1 + len(body["prompt"])))

    server.answer = answer
    engine = connect(rows=5)
    done = complete(engine, [Request(str(i), [i], 9) for i in range(20)])
    assert {int(i): c.token_ids for i, c in done.items()} == {i: [i, END] for i in range(20)}
    assert 2 <= server.most_open <= 5


def test_step_does_not_wait_for_ever(server, connect):
    go, engine = hold(server), connect()
    engine.add(Request("a", [1], 4))
    assert engine.step() == [] and engine.has_work()
    go.set()
    assert complete(engine, [])["a"].finish == "eos"


def test_dropped_requests_are_forgotten(server, connect):
    """One has finished, one is being sampled and one waits for a connection; the server notices."""
    left = threading.Event()

    def answer(body, reply):
        if body["prompt"] == [1]:
            send_on(reply, left)
        reply.send(body["prompt"], [-0.1])

    server.answer = answer
    engine = connect(rows=1)
    engine.add(Request("finished", [7], 1))
    until(lambda: not engine.finished.empty())
    engine.add(Request("a", [1], 63))
    until(lambda: len(server.sent) >= 3)
    engine.add(Request("waits", [1], 63))
    engine.drop()
    assert not engine.has_work() and engine.step() == []
    assert left.wait(10)
    done = complete(engine, [Request(name, [3], 1) for name in ("a", "waits", "finished")])
    assert [c.token_ids for c in done.values()] == [[3]] * 3
    # of the dropped ones the last may have been sent, if it got the connection before it was cancelled itself
    assert [body["prompt"] for body in server.bodies if body["prompt"] != [1]] == [[7], [3], [3], [3]]


def test_step_waits_only_if_there_is_nothing_else_to_do(server, connect):
    go, engine, waited = hold(server), connect(), []
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
    go.set()


def test_a_closed_engine_leaves_no_connection_and_no_thread(server, connect, caplog, monkeypatch):
    """One request is being sampled, one waits for its next try, and one for a connection."""
    left = threading.Event()

    def answer(body, reply):
        if body["prompt"] == [0]:
            return 500
        send_on(reply, left)

    server.answer = answer
    monkeypatch.setattr(engine_http, "BACKOFF", 30.0)
    engine = connect(rows=1)
    for i in range(3):
        engine.add(Request(str(i), [i], 63))
    until(lambda: len(server.sent) >= 3)
    start = time.monotonic()
    engine.close()
    assert not engine.has_work() and not engine.thread.is_alive() and left.wait(10)
    assert time.monotonic() - start < 10 and [body["prompt"] for body in server.bodies].count([0]) == 1
    engine.close()
    gc.collect()
    assert not caplog.records  # asyncio's, of tasks that were destroyed


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_turn_is_tried_again_from_its_start(server, connect):
    """429, 500, a torn stream and an error inside the stream; the stop rule and the text begin anew each time."""
    block = ids("\n```python\nprint(2)\n```")

    def answer(body, reply):
        trial = len(server.bodies)
        if trial <= 2:
            return (429, 500)[trial - 1]
        if trial <= 4:
            reply.send(block[:-1], [-9.0] * (len(block) - 1))  # the block is all but closed
            if trial == 3:
                reply.wfile.write(b"torn")
                reply.connection.close()
                raise ConnectionResetError
            reply.event({"error": {"message": "engine died"}})
            return None
        reply.send(block, [-0.5] * len(block))

    server.answer = answer
    done = complete(connect(), [Request("a", [1], 60, seed=7, stop=FenceParser())])["a"]
    assert done.token_ids == block and done.logps == [-0.5] * len(block) and done.finish == "stop"
    assert len(server.bodies) == 5 and all(body == server.bodies[0] for body in server.bodies)


def test_a_stream_torn_after_its_last_token_is_whole(server, connect):
    def answer(body, reply):
        reply.send([1, 2], [-0.1, -0.2])
        reply.wfile.write(b"torn")
        reply.connection.close()
        raise ConnectionResetError

    server.answer = answer
    done = complete(connect(), [Request("a", [1], 2)])["a"]
    assert done.token_ids == [1, 2] and done.finish == "length" and len(server.bodies) == 1


def test_a_stream_that_cannot_be_decoded_is_a_fault_of_the_server(server, connect, monkeypatch):
    def answer(body, reply):
        reply.send_response(200)
        reply.send_header("Content-Encoding", "gzip")
        reply.send_header("Content-Length", "5")
        reply.end_headers()
        reply.wfile.write(b"plain")

    server.answer = answer
    monkeypatch.setattr(engine_http, "TRIES", 2)
    with pytest.raises(ServerError, match="failed 2 times, at last with DecodingError"):
        complete(connect(), [Request("a", [1], 2)])


def test_faults_that_stay_are_one_line(server, connect, monkeypatch):
    engine = connect(silence=0.2)
    monkeypatch.setattr(engine_http, "TRIES", 2)

    def fault(answer) -> str:
        server.answer = answer
        with pytest.raises(ServerError) as caught:
            complete(engine, [Request("a", [1], 4)])
        assert not engine.has_work() and str(caught.value).startswith(server.url) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "failed 2 times, at last with 500: the server is ill" in fault(lambda body, reply: 500)
    before = len(server.bodies)
    assert "refused the request with 404: the server is ill" in fault(lambda body, reply: 404)
    assert len(server.bodies) == before + 1  # no second try: it would be refused again
    assert "no token ids" in fault(lambda body, reply: reply.send(None))
    assert "the stream ended early" in fault(lambda body, reply: reply.send([1], [-0.1]))
    monkeypatch.setattr(engine_http, "TRIES", 3)
    before = len(server.bodies)
    assert "failed 2 times, at last with ReadTimeout" in fault(lambda body, reply: time.sleep(1))
    assert len(server.bodies) == before + 2
    server.http.shutdown()
    server.http.server_close()
    assert "ConnectError" in fault(None)


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
def test_a_malformed_chunk_is_one_line(server, connect, chunk):
    server.answer = lambda body, reply: reply.event(chunk)
    with pytest.raises(ServerError, match="no token ids with log-probs") as caught:
        complete(connect(), [Request("a", [1], 4, stop=FenceParser())])
    assert len(str(caught.value).splitlines()) == 1 and len(server.bodies) == 1  # another try would bring the same


def test_an_error_without_words_is_one_line(server, connect, monkeypatch):
    monkeypatch.setattr(engine_http, "TRIES", 1)
    for error in (None, {"message": None}, {"message": {"a": 1}}, "text"):
        server.answer = lambda body, reply, error=error: reply.event({"error": error})
        with pytest.raises(ServerError, match="failed 1 times"):
            complete(connect(), [Request("a", [1], 4)])


def test_a_server_that_is_none_is_found_out_at_once(server, connect):
    with pytest.raises(ServerError, match=f"{server.url}: serves tiny, not big$"):
        HTTPEngine(server.url + "#big")
    assert connect("#tiny").model == "tiny"
    server.models[0]["root"] = "/nowhere/at/all"
    with pytest.raises(ServerError, match="serves /nowhere/at/all, whose tokenizer is needed here"):
        connect()
    server.models = [{"id": "tiny"}]
    with pytest.raises(ServerError, match="is it vLLM"):
        connect()
    server.models = {"x": 1}
    with pytest.raises(ServerError, match="not as `vllm serve` does"):
        connect()
    for url in ("http://127.0.0.1:1", "http://127.0.0.1:port"):
        with pytest.raises(ServerError, match="is `vllm serve` running there"):
            HTTPEngine(url)


def test_a_server_keeps_its_weights(server, connect):
    engine = connect()
    with pytest.raises(RuntimeError, match="a server keeps its weights"):
        engine.update_weights([])
    engine.sleep()


# ---- from the scripts -----------------------------------------------------------------------------------------------


def test_load_engine_reads_the_name(server, model):
    with contextlib.closing(load_engine(server.url, "auto", 4)) as engine:
        assert isinstance(engine, HTTPEngine)
    with pytest.raises(ValueError, match="--device cpu: vLLM chooses its own"):
        load_engine(server.url, "cpu", 4)
    with pytest.raises(RuntimeError, match="no weights"):
        load_engine(f"vllm:{model}", "auto", 4)


def test_whole_trajectories_over_http(server, connect, executor):
    turns = ["Compute.\n```python\nprint(6 * 7)\n```", "\nIt is \\boxed{42}."]
    server.models[0]["max_model_len"] = 4096

    def answer(body, reply):
        said = "42" in byte_tokenizer().decode(body["prompt"])
        tokens = ids(turns[said]) + [END] * said
        reply.send(tokens, [-0.1] * len(tokens))

    server.answer = answer
    engine = connect(rows=4)
    problems = load_problems("synthetic", split="train", limit=6, seed=0)
    for trajectory in solve(engine, executor, problems, Sampling(max_tokens=400)):
        text = trajectory.text(engine.tokenizer)
        assert text == turns[0] + "\n```output\n42\n```\n" + turns[1] and trajectory.finish == "stop"


@pytest.mark.parametrize("fault", ["down", "model", "ill"])
def test_a_script_says_it_in_one_line(server, tmp_path, fault):
    server.answer = lambda body, reply: 400
    url = {"down": "http://127.0.0.1:1", "model": f"{server.url}#big", "ill": server.url}[fault]
    says = {"down": "no answer", "model": "not big", "ill": "refused the request with 400: the server is ill"}[fault]
    server.models[0]["max_model_len"] = 4096
    done = subprocess.run(
        [sys.executable, ROOT / "run_infer.py", "What is 2 + 2?", "--model", url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
