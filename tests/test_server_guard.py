"""Which requests reach the application at all: by host, origin, address and size."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (the extra 'server')")

import uvicorn
from fastapi import FastAPI, Request
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from segqc.server import connection
from segqc.server.guard import MAX_PLAIN_BODY_BYTES, AllowedHosts, BodyLimits, Guard, Traffic, host_of
from segqc.settings import SettingsError, load_settings

FORM = "multipart/form-data; boundary=b"
GENEROUS = BodyLimits(10_000, 100_000)


@dataclass
class Call:
    """One request to a guarded application that answers with what reached it."""

    path: str = "/infer/x"
    method: str = "POST"
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("host", "127.0.0.1:8000")])
    query: bytes = b""
    server: tuple[str, int] | None = ("127.0.0.1", 8000)
    body: list[bytes] = field(default_factory=lambda: [b""])

    def scope(self) -> Scope:
        return {
            "type": "http",
            "method": self.method,
            "path": self.path,
            "query_string": self.query,
            "headers": [(n.encode("latin-1"), v.encode("latin-1")) for n, v in self.headers],
            "server": self.server,
        }


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        told = json.loads(self.body)["detail"]
        assert isinstance(told, str)
        return told


def application() -> FastAPI:
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def echo(path: str, request: Request) -> dict[str, object]:
        return {"path": path, "host": request.headers["host"], "received": len(await request.body())}

    return app


async def ask(app: Callable[[Scope, Receive, Send], Awaitable[None]], call: Call) -> Answer:
    messages: list[Message] = []
    chunks = iter(call.body)
    left = len(call.body)

    async def receive() -> Message:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": next(chunks), "more_body": left > 0}

    async def send(message: Message) -> None:
        messages.append(message)

    await app(call.scope(), receive, send)
    headers = {n.decode(): v.decode() for n, v in messages[0]["headers"]}
    return Answer(messages[0]["status"], headers, b"".join(m.get("body", b"") for m in messages[1:]))


def guarded(
    call: Call,
    *,
    names: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    limits: BodyLimits = GENEROUS,
    traffic: Traffic | None = None,
) -> Answer:
    guard = Guard(
        application(), hosts=AllowedHosts(names), origins=origins, limits=limits, traffic=traffic or Traffic()
    )
    return asyncio.run(ask(guard, call))


# -------------------------------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LocalHost:8000", "localhost.", "segqc.localhost:80", "127.0.0.1", "127.0.0.1:8000", "127.8.9.1",
        "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]:8000", " localhost:8000 ",
    ],
)  # fmt: skip
def test_loopback_names_are_always_answered(host: str) -> None:
    assert guarded(Call(headers=[("host", host)])).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost",
        "192.0.2.7", "192.0.2.7:8000", "[2001:db8::1]", "", ":8000", "localhost:port", "localhost:8000:80",
        "user@localhost", "localhost/", "localhost, evil.example", "local host", "[localhost]", "[::1", "::1",
        "127.0.0.1#", "127.0.0.1\u00a0", "*", "2130706433", "0x7f.1",
    ],
)  # fmt: skip
def test_any_other_host_is_refused_and_the_setting_named(host: str) -> None:
    answer = guarded(Call(headers=[("host", host), ("x-forwarded-host", "localhost"), ("forwarded", "host=localhost")]))
    assert answer.status == 421
    assert "server.allowed_hosts" in answer.detail


@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"], ["localhost", "evil.example"]])
def test_a_request_names_one_host(hosts: list[str]) -> None:
    assert guarded(Call(headers=[("host", host) for host in hosts])).status == 421


@pytest.mark.parametrize(
    ("name", "asked", "allowed"),
    [
        ("segqc.example.org", "SEGQC.example.org.:443", True),
        ("segqc.example.org", "other.example.org", False),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "evilexample.org", False),
        ("10.1.2.3", "10.1.2.3:8000", True),
        ("fd00::5", "[FD00:0::5]:8000", True),
        ("*", "anything.example", True),
        ("*", "no host", False),
    ],
)
def test_the_settings_add_names(name: str, asked: str, allowed: bool) -> None:
    assert guarded(Call(headers=[("host", asked)]), names=(name,)).status == (200 if allowed else 421)


@pytest.mark.parametrize(
    ("local", "asked", "allowed"),
    [
        ("10.1.2.3", "10.1.2.3:8000", True),
        ("10.1.2.3", "10.1.2.4:8000", False),
        ("fe80::1%eth0", "[fe80::1]:8000", True),
        ("::ffff:10.1.2.3", "10.1.2.3", True),
    ],
)
def test_the_address_that_a_connection_came_in_by_is_the_servers_own(local: str, asked: str, allowed: bool) -> None:
    call = Call(headers=[("host", asked)], server=(local, 8000))
    assert guarded(call).status == (200 if allowed else 421)


def test_a_whole_url_names_the_host_itself() -> None:
    answer = guarded(Call(path="http://127.0.0.1:8000/info/", headers=[("host", "evil.example")]))
    assert json.loads(answer.body) == {"path": "info/", "host": "127.0.0.1:8000", "received": 0}
    for target in ("http://evil.example/info/", "HTTPS://evil.example", "http:///info/"):
        assert guarded(Call(path=target)).status == 421


@pytest.mark.parametrize("name", ["http://segqc.example.org", "segqc.example.org:8000", "a b", "", "ex*mple.org"])
def test_a_setting_that_is_no_host_name_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="allowed_hosts"):
        load_settings(overrides={"server": {"allowed_hosts": [name]}})


@pytest.mark.parametrize("authority", ["a_b.c-d", "10.0.0.1:1", "[::1]:65535"])
def test_a_host_is_the_same_when_it_is_asked_for_twice(authority: str) -> None:
    host = host_of(authority)
    assert host is not None
    assert host_of(f"[{host}]" if ":" in host else host) == host


# ------------------------------------------------------------------------------------------------ origins and addresses


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("https://127.0.0.1:8000", 200),
        ("https://viewer.example", 200),
        ("http://127.0.0.1:9000", 403),
        ("http://evil.example", 403),
        ("https://viewer.example.evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[evil", 403),
    ],
)
def test_pages_of_other_origins_are_refused(origin: str, status: int) -> None:
    call = Call(headers=[("host", "127.0.0.1:8000"), ("origin", origin)])
    assert guarded(call, origins=("https://viewer.example",)).status == status


@pytest.mark.parametrize("path", ["//info/", "/info//", "///info///"])
def test_slashes_in_a_row_are_one(path: str) -> None:
    assert json.loads(guarded(Call(path=path)).body)["path"] == "info/"


@pytest.mark.parametrize(
    "call", [Call(path="/a\0b"), Call(path="/a\nb"), Call(query=b"a=%00"), Call(query=b"%0d%0a=1")]
)
def test_control_characters_in_an_address_are_refused(call: Call) -> None:
    assert guarded(call).status == 400


def test_too_many_headers_are_refused() -> None:
    assert guarded(Call(headers=[("host", "localhost"), *[("x", "y")] * 500])).status == 431


# --------------------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("content_type", [FORM, "application/json", "application/octet-stream"])
def test_a_body_over_the_limit_is_refused_with_and_without_a_length(content_type: str, declared: bool) -> None:
    body = [b"x" * 1000] * 11
    headers = [("host", "localhost"), ("content-type", content_type)]
    if declared:
        headers.append(("content-length", str(sum(map(len, body)))))
    traffic = Traffic()
    answer = guarded(Call(headers=headers, body=body), traffic=traffic)
    assert answer.status == 413
    assert traffic.received == 0
    assert guarded(Call(headers=headers[:2], body=body[:9])).status == 200


def test_what_is_no_form_is_kept_in_memory_and_has_a_smaller_limit() -> None:
    limits = BodyLimits(10 * MAX_PLAIN_BODY_BYTES, 100 * MAX_PLAIN_BODY_BYTES)
    body = [b"x" * (MAX_PLAIN_BODY_BYTES + 1)]
    for path, content_type, status in (
        ("/infer/x", FORM, 200),
        ("//infer//x", FORM, 200),
        ("/infer/x", "application/json", 413),
        ("/infer/x", "text/plain", 413),
        ("/train/x", FORM, 413),  # takes parameters only, which a form would not keep out of the memory
        ("/activelearning/x", FORM, 413),
    ):
        call = Call(path, headers=[("host", "localhost"), ("content-type", content_type)], body=body)
        assert guarded(call, limits=limits).status == status


def test_a_form_that_the_disk_has_no_room_for_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10 * MAX_PLAIN_BODY_BYTES))
    limits = BodyLimits(100 * MAX_PLAIN_BODY_BYTES, 100 * MAX_PLAIN_BODY_BYTES)
    for length, status in ((11 * MAX_PLAIN_BODY_BYTES, 507), (9 * MAX_PLAIN_BODY_BYTES, 200)):
        headers = [("host", "localhost"), ("content-type", FORM), ("content-length", str(length))]
        assert guarded(Call(headers=headers), limits=limits).status == status


def test_all_requests_together_have_a_limit_and_give_back_what_they_took() -> None:
    traffic = Traffic()
    limits = BodyLimits(10_000, 15_000)
    guard = Guard(application(), hosts=AllowedHosts(), origins=(), limits=limits, traffic=traffic)
    headers = [("host", "localhost"), ("content-type", FORM)]

    async def scenario() -> tuple[Answer, Answer, Answer]:
        more = asyncio.Event()
        sent = 0

        async def slow() -> Message:
            nonlocal sent
            sent += 1
            if sent > 1:
                await more.wait()
                return {"type": "http.request", "body": b"", "more_body": False}
            return {"type": "http.request", "body": b"x" * 9000, "more_body": True}

        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        first = asyncio.create_task(guard(Call(headers=headers).scope(), slow, send))
        while traffic.received < 9000:
            await asyncio.sleep(0)
        second = await ask(guard, Call(headers=headers, body=[b"x" * 9000]))
        declared = await ask(guard, Call(headers=[*headers, ("content-length", "9000")], body=[b"x" * 9000]))
        assert traffic.received == 9000
        more.set()
        await first
        assert messages[0]["status"] == 200
        return second, declared, await ask(guard, Call(headers=headers, body=[b"x" * 9000]))

    second, declared, after = asyncio.run(scenario())
    assert (second.status, declared.status, after.status) == (503, 503, 200)
    assert second.headers["retry-after"]
    assert "later" in second.detail
    assert not traffic.open


@pytest.mark.parametrize("first", [[], [b"x" * 10]])
def test_a_body_that_stops_coming_ends_the_request(first: list[bytes]) -> None:
    traffic = Traffic()
    limits = BodyLimits(10_000, 10_000, pause_seconds=0.05)
    guard = Guard(application(), hosts=AllowedHosts(), origins=(), limits=limits, traffic=traffic)
    messages: list[Message] = []
    chunks = iter(first)

    async def receive() -> Message:
        for chunk in chunks:
            return {"type": "http.request", "body": chunk, "more_body": True}
        await asyncio.Event().wait()
        raise AssertionError("nothing comes any more")

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(guard(Call().scope(), receive, send))
    assert messages[0]["status"] == 408
    assert (b"connection", b"close") in messages[0]["headers"]
    assert not traffic.open


def test_a_request_that_is_answered_may_wait_for_long() -> None:
    limits = BodyLimits(10_000, 10_000, pause_seconds=0.01)
    app = FastAPI()

    @app.post("/infer/x")
    async def slow(request: Request) -> int:
        length = len(await request.body())
        await asyncio.sleep(0.1)
        return length

    guard = Guard(app, hosts=AllowedHosts(), origins=(), limits=limits, traffic=Traffic())
    assert asyncio.run(ask(guard, Call(body=[b"x" * 10]))).body == b"10"


def test_the_servers_end_is_told_to_who_still_waits(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    @app.post("/infer/x")
    async def forever() -> None:
        await asyncio.Event().wait()

    app.add_middleware(Guard, hosts=AllowedHosts(), origins=(), limits=GENEROUS, traffic=Traffic())

    async def scenario() -> Answer:
        waiting = asyncio.create_task(ask(app, Call()))
        await asyncio.sleep(0.05)
        waiting.cancel()
        return await waiting

    answer = asyncio.run(scenario())
    assert answer.status == 503
    assert "the server ends" in answer.detail
    assert "cut off" in caplog.text
    assert "POST /infer/x" in caplog.text


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"GET / HTTP/1.1\r\n\r\nGET / HT"])
def test_a_connection_on_which_no_request_comes_is_closed(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(connection, "_HEAD_SECONDS", 0.05)

    async def scenario() -> bytes:
        config = uvicorn.Config(application(), http=connection.Connection, log_config=None, lifespan="off")
        config.load()
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: connection.Connection(config, state, {}), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(begun)
        received = await reader.read()  # until the server closes it
        writer.close()
        server.close()
        return received

    assert asyncio.run(scenario()).count(b"HTTP/1.1 ") == begun.count(b"\r\n\r\n")


def test_a_mistake_of_the_servers_own_is_logged_under_the_id_that_the_client_gets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()

    @app.post("/infer/x")
    def fail() -> None:
        raise ZeroDivisionError("a secret")

    app.add_middleware(Guard, hosts=AllowedHosts(), origins=(), limits=GENEROUS, traffic=Traffic())
    answer = asyncio.run(ask(app, Call()))
    assert answer.status == 500
    assert "a secret" not in answer.detail
    number = answer.detail.rstrip(".").split()[-1]
    assert number in caplog.text
    assert "ZeroDivisionError: a secret" in caplog.text
