"""Signing in: which role each route needs, tokens, sessions, proxies, and guessing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import httpx
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from segqc.loop.dataset import Dataset
from segqc.server.auth import passwords
from segqc.server.auth.gate import Downloads, Gate
from segqc.server.auth.identity import ROLES, Identity, identity_of, sha256_of_secret
from segqc.server.auth.proxies import Proxies
from segqc.server.auth.roles import PUBLIC, ROLES_OF_ROUTES, needed_for
from segqc.server.auth.sign_in import Desk
from segqc.server.auth.throttle import (
    FIRST_PAUSE_SECONDS,
    FORGOTTEN_SECONDS,
    FREE_OF_ADDRESS,
    FREE_OF_USER,
    LONGEST_PAUSE_SECONDS,
    MAX_COUNTED,
    Throttle,
)
from segqc.server.monailabel.client import MONAILabelClient, MONAILabelClientException
from segqc.server.serve import ServeError, serve
from segqc.settings import AuthSettings, SettingsError
from segqc.store import jobs, labels, leases, scans, users
from segqc.store.store import Store
from segqc.volumes import write_labels
from tests.auth_kit import PASSWORD, add_users, quick_hashes
from tests.auth_kit import ROLES as USERS
from tests.server_kit import CONFIG, add_models, application, draw_case, listening, make_dataset

EVIL = "https://evil.example"


class Seconds:
    """A clock in seconds that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True, scope="module")
def _passwords_are_hashed_quickly() -> Iterator[None]:
    with quick_hashes():
        yield


# ----------------------------------------------------------------------------------------------------------- the table


def test_each_route_has_a_role_and_each_row_a_route() -> None:
    from segqc.server.app import create_app
    from segqc.server.routers import dicomweb_routers

    found = set()
    for route in iter_route_contexts(create_app().routes):
        if isinstance(route.original_route, Mount):
            found.add(f"GET {route.path}/{{path:path}}")
            continue
        methods = set(route.methods or ())
        found |= {f"{method} {route.path}" for method in methods if method != "HEAD"}
        if "HEAD" in methods and f"GET {route.path}" not in ROLES_OF_ROUTES:
            found.add(f"HEAD {route.path}")  # the row of GET is its row
    of_pacs = [route for router in dicomweb_routers(from_pacs=True) for route in router.routes]
    found |= {f"{method} {route.path}" for route in of_pacs for method in route.methods}  # type: ignore[attr-defined]
    assert sorted(found - ROLES_OF_ROUTES.keys()) == [], "routes without a role: add them to segqc/server/auth/roles.py"
    whole = tuple(route.removesuffix("{path:path}") for route in found if route.endswith("{path:path}"))
    rows = [row for row in ROLES_OF_ROUTES.keys() - found if not row.startswith(whole)]
    assert rows == [], "rows without a route, or a part of one"


def address_of(path: str) -> str:
    """An address that a route answers."""
    return path.replace("{path:path}", "x/y").replace("{", "").replace("}", "")


def test_each_row_is_found_by_its_address_with_and_without_a_slash() -> None:
    for row, needed in ROLES_OF_ROUTES.items():
        method, _, path = row.partition(" ")
        address = address_of(path)
        assert needed_for(method, address) == needed
        if address != "/" and not path.endswith("{path:path}"):
            assert needed_for(method, address.removesuffix("/") if address.endswith("/") else f"{address}/") == needed
    assert needed_for("HEAD", "/datastore/image") == "annotator"
    for method, path in (("PATCH", "/info/"), ("GET", "/nothing"), ("POST", "/"), ("GET", "/auth/token")):
        assert needed_for(method, path) is None


@pytest.fixture(scope="module")
def user_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store.open(tmp_path_factory.mktemp("users"))
    add_users(store)
    yield store
    store.close()


async def told_who(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that tells who asks, and from where."""
    try:
        identity = identity_of(scope)
    except KeyError:
        await JSONResponse("public")(scope, receive, send)
        return
    actor = identity.actor
    request = Request(scope)
    assert request.client is not None
    body = {
        "role": identity.role,
        "name": actor and actor.name,
        "by": actor and actor.identified_by,
        "from": request.client.host,
        "scheme": request.url.scheme,
    }
    await JSONResponse(body)(scope, receive, send)


def gate(
    store: Store, *, sign_in: bool = True, client: str = "10.0.0.9", clock: Seconds | None = None, **settings: object
) -> TestClient:
    made = AuthSettings.model_validate(settings)
    downloads = Downloads(60 * made.download_minutes, clock or Seconds())
    app = Gate(told_who, sign_in=sign_in, settings=made, cookie="c", store=lambda: store, downloads=downloads)
    return TestClient(app, client=(client, 1234), follow_redirects=False)


def token_of(store: Store, name: str, kind: str = "token") -> str:
    secret = f"secret of {name} for a {kind}"
    with store.write() as transaction:
        user = users.get(transaction, name)
        users.end(transaction, sha256_of_secret(secret))
        settings = AuthSettings()
        lifetime = Desk(settings)._lifetimes[kind]  # type: ignore[index]
        users.begin(transaction, user, kind, sha256_of_secret(secret), "signed-in", lifetime, "here")  # type: ignore[arg-type]
    return secret


def test_each_route_lets_through_its_role_and_higher_ones(user_store: Store) -> None:
    client = gate(user_store)
    tokens = {name: token_of(user_store, name) for name in USERS}
    for row, needed in ROLES_OF_ROUTES.items():
        method, _, path = row.partition(" ")
        found = {None: client.request(method, address_of(path))}
        for name, token in tokens.items():
            found[name] = client.request(method, address_of(path), headers={"Authorization": f"Bearer {token}"})
        if needed == PUBLIC:
            assert {answer.status_code for answer in found.values()} == {200}, row
            continue
        assert found[None].status_code == 401, row
        assert found[None].headers["www-authenticate"] == "Bearer"
        for name, role in USERS.items():
            allowed = ROLES.index(role) >= ROLES.index(needed)
            assert found[name].status_code == (200 if allowed else 403), (row, name)
            if not allowed:
                assert found[name].json()["detail"] == f"this needs the role {needed!r}, and yours is {role!r}."


def test_what_has_no_row_is_not_answered(user_store: Store) -> None:
    client = gate(user_store)
    assert client.get("/new/route").status_code == 401
    answer = client.get("/new/route", headers={"Authorization": f"Bearer {token_of(user_store, 'otto')}"})
    assert answer.status_code == 404


def test_where_nobody_signs_in_everybody_is_an_operator(user_store: Store) -> None:
    client = gate(user_store, sign_in=False)
    for path in ("/logs/", "/new/route"):
        assert client.get(path).json()["role"] == "operator"
    assert client.get("/logs/", headers={"Authorization": "Bearer wrong"}).json()["name"] is None


# ------------------------------------------------------------------------------------------- tokens, sessions, proxies


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": "Basic {token}"},
     {"Authorization": "{token}"}, {"Authorization": "Bearer {session}"}, {"Cookie": "c={token}"},
     {"Cookie": "d={session}"}, {"Cookie": 'c="'}, {"Cookie": "c=\x00"}],
)  # fmt: skip
def test_what_is_no_sign_in_is_refused(user_store: Store, headers: dict[str, str]) -> None:
    secrets = {kind: token_of(user_store, "anna", kind) for kind in ("token", "session")}
    sent = {name: text.format(**secrets) for name, text in headers.items()}
    assert gate(user_store).get("/info/", headers=sent).status_code == 401


def test_a_session_and_a_token_are_the_same_person(user_store: Store) -> None:
    client = gate(user_store)
    by_token = client.get("/info/", headers={"Authorization": f"bearer {token_of(user_store, 'anna')}"})
    session = token_of(user_store, "anna", "session")
    by_session = client.get("/info/", headers={"Cookie": f"b=1; c={session}"})
    assert by_token.json() == by_session.json()
    assert by_token.headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Accept": "text/html"}, 303), ({"Accept": "text/html", "Sec-Fetch-Mode": "navigate"}, 303),
     ({"Accept": "text/html", "Sec-Fetch-Mode": "cors"}, 401), ({"Accept": "*/*"}, 401)],
)  # fmt: skip
def test_a_browser_is_sent_to_the_sign_in_page(user_store: Store, headers: dict[str, str], status: int) -> None:
    answer = gate(user_store).get("/ohif/segqc?StudyInstanceUIDs=1.2&x=a%26b", headers=headers)
    assert answer.status_code == status
    if status == 303:
        wanted = httpx.URL(answer.headers["location"])
        assert (wanted.path, wanted.params["next"]) == (
            "/auth/sign-in", "/ohif/segqc?StudyInstanceUIDs=1.2&x=a%26b"
        )  # fmt: skip
    assert gate(user_store).post("/info/", headers={"Accept": "text/html"}).status_code == 401


PROXY = {"user_header": "X-User", "trusted_proxies": ("10.0.0.0/24", "fd00::1")}


@pytest.mark.parametrize("address", ["10.0.0.9", "::ffff:10.0.0.9", "fd00::1"])
def test_a_trusted_proxy_names_the_user(user_store: Store, address: str) -> None:
    client = gate(user_store, client=address, **PROXY)
    answer = client.get("/logs/", headers={"X-User": "OTTO", "X-Forwarded-For": "1.1.1.1"})
    assert answer.json() == {
        "role": "operator", "name": "otto", "by": "trusted-header", "from": "1.1.1.1", "scheme": "http"
    }  # fmt: skip
    assert client.get("/logs/").status_code == 401
    assert client.get("/logs/", headers=[("X-User", "otto"), ("X-User", "zoe")]).status_code == 401
    stranger = client.get("/info/", headers={"X-User": "zoe"})
    assert stranger.status_code == 403
    assert "nobody has said what 'zoe' may do" in stranger.json()["detail"]
    known = gate(user_store, client=address, header_role="annotator", **PROXY)
    assert known.get("/info/", headers={"X-User": "zoe"}).json()["name"] == "zoe"
    assert known.get("/logs/", headers={"X-User": "zoe"}).status_code == 403


@pytest.mark.parametrize("address", ["10.0.1.9", "127.0.0.1", "testclient"])
def test_a_header_from_elsewhere_is_ignored_with_a_word_in_the_log(
    user_store: Store, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    client = gate(user_store, client=address, **PROXY)
    for _ in range(3):
        headers = {"X-User": "otto", "X-Forwarded-For": "10.0.0.9", "X-Forwarded-Proto": "https"}
        assert client.get("/logs/", headers=headers).status_code == 401
    assert [r.getMessage() for r in caplog.records if address in r.getMessage()] == [
        f"{address} names a user in the header 'X-User' and is none of auth.trusted_proxies: ignored"
    ]
    headers["Authorization"] = f"Bearer {token_of(user_store, 'anna')}"
    answer = client.get("/info/", headers=headers).json()
    assert (answer["name"], answer["from"], answer["scheme"]) == ("anna", address, "http")


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [("1.1.1.1", "1.1.1.1"), ("9.9.9.9, 1.1.1.1", "1.1.1.1"), ("10.0.0.3, 1.1.1.1, 10.0.0.4", "1.1.1.1"),
     ("1.1.1.1, nonsense", "10.0.0.9"), ("", "10.0.0.9"), ("nonsense, 10.0.0.4", "10.0.0.4"),
     ("2001:db8::1", "2001:db8::1")],
)  # fmt: skip
def test_the_last_address_that_is_no_proxys_is_the_clients(user_store: Store, forwarded: str, address: str) -> None:
    client = gate(user_store, sign_in=False, **PROXY)
    told = client.get("/", headers={"X-Forwarded-For": forwarded, "X-Forwarded-Proto": "https"}).json()
    assert (told["from"], told["scheme"]) == (address, "https")


def test_nothing_is_trusted_without_addresses() -> None:
    assert not any(Proxies(()).trusts(address) for address in ("127.0.0.1", "::1", "", "unix:"))


# ------------------------------------------------------------------------------------------------------------ guessing


def failures(throttle: Throttle, count: int, user: str = "anna", address: str = "10.0.0.1") -> list[float]:
    return [throttle.begin(user, address) for _ in range(count)]


def test_after_some_wrong_passwords_the_next_ones_wait_longer_and_longer() -> None:
    clock = Seconds()
    throttle = Throttle(clock)
    assert failures(throttle, FREE_OF_USER) == [0] * FREE_OF_USER
    pauses = []
    for _ in range(12):
        wait = throttle.begin("anna", "10.0.0.2")
        pauses.append(wait)
        assert throttle.begin("anna", "10.0.0.3") == wait, "asking while it waits costs nothing"
        clock.now += wait
        assert throttle.begin("anna", "10.0.0.4") == 0
    assert pauses[:3] == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    assert throttle.begin("bert", "10.0.0.5") == 0


def test_a_right_password_begins_the_count_anew() -> None:
    throttle = Throttle(Seconds())
    for _ in range(3 * FREE_OF_ADDRESS):
        assert failures(throttle, FREE_OF_USER - 1, address="10.0.0.1") == [0] * (FREE_OF_USER - 1)
        assert throttle.begin("anna", "10.0.0.2") == 0
        throttle.succeed("anna", "10.0.0.2")
        throttle._counts.pop(("address", "10.0.0.1", ""))
        throttle._counts.pop(("anna",), None)


def test_an_address_that_tries_many_users_waits() -> None:
    clock = Seconds()
    throttle = Throttle(clock)
    for number in range(FREE_OF_ADDRESS):
        assert throttle.begin(f"user {number}", f"2001:db8::{number + 1:x}") == 0
    assert throttle.begin("another", "2001:db8::ffff") > 0, "a /64 is one address"
    assert throttle.begin("another", "2001:db8:0:1::1") == 0


def test_nobody_can_keep_a_user_out_who_has_signed_in_from_there_before() -> None:
    throttle = Throttle(Seconds())
    assert throttle.begin("anna", "10.0.0.1") == 0
    throttle.succeed("anna", "10.0.0.1")
    failures(throttle, 10, address="10.6.6.6")
    assert throttle.begin("anna", "10.7.7.7") > 0
    assert throttle.begin("anna", "10.0.0.1") == 0


def test_what_is_counted_is_forgotten_and_bounded() -> None:
    clock = Seconds()
    throttle = Throttle(clock)
    failures(throttle, FREE_OF_USER)
    clock.now += FORGOTTEN_SECONDS + 1
    assert failures(throttle, FREE_OF_USER) == [0] * FREE_OF_USER
    for number in range(MAX_COUNTED):
        throttle.begin(f"user {number}", f"10.{number >> 8}.{number & 255}.1")
    assert len(throttle._counts) == MAX_COUNTED


@pytest.mark.parametrize("password_hash", [None, "", "no hash", "$argon2id$v=19$m=8,t=1,p=1$AAAAAAAAAAA$AAAA"])
def test_no_password_is_right_without_its_hash(password_hash: str | None) -> None:
    assert not passwords.matches("the password of no user", password_hash)


def test_passwords_are_the_same_from_every_keyboard() -> None:
    made = passwords.hash_password("Stra\u00dfe und \u00c4rger", "anna")
    assert passwords.matches("Stra\u00dfe und A\u0308rger", made)
    assert not passwords.matches("Strasse und Arger", made)
    assert not passwords.matches("x" * 100_000, made)
    assert not passwords.matches("\udcff", made)


# --------------------------------------------------------------------------------------------------- the whole server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_dataset(tmp_path_factory.mktemp("auth") / "studies", scans=4, finals=0)
    add_users(Dataset(made).store)
    return made


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[FastAPI]:
    with application(folder, sign_in=True) as made, TestClient(made):
        yield made


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A browser or program of its own; nobody was signed in wrongly before."""
    app.state.auth = dataclasses.replace(app.state.auth, desk=Desk(app.state.auth.settings, Throttle(Seconds())))
    yield TestClient(app, follow_redirects=False, client=("10.0.0.9", 1), raise_server_exceptions=False)


def bearer(client: TestClient, name: str) -> dict[str, str]:
    answer = client.post("/auth/token", data={"username": name, "password": PASSWORD, "grant_type": "password"})
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"{answer.json()['token_type']} {answer.json()['access_token']}"}


def sign_in(client: TestClient, name: str, password: str = PASSWORD, **more: str) -> httpx.Response:
    return client.post("/auth/sign-in", data={"username": name, "password": password, **more})


def test_a_token_is_given_checked_and_given_back(client: TestClient) -> None:
    assert client.get("/auth/").json()["enabled"] is True
    assert client.get("/auth/token/valid").status_code == 401
    headers = bearer(client, "Rita")
    assert client.get("/auth/token/valid", headers=headers).json() == {
        "username": "rita", "name": "rita", "email": None, "roles": ["reviewer"], "identified_by": "signed-in"
    }  # fmt: skip
    assert client.delete("/auth/token", headers=headers).status_code == 200
    assert client.get("/auth/token/valid", headers=headers).status_code == 401


def test_a_browser_signs_in_and_out(client: TestClient) -> None:
    page = client.get("/auth/sign-in?next=/info/")
    assert page.status_code == 200
    assert 'value="/info/"' in page.text
    assert "<script>" not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    answer = sign_in(client, "anna", next="/info/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/info/")
    cookie = answer.headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "SameSite=lax", "Path=/", "Max-Age=43200"))
    assert "Secure" not in cookie
    assert client.get("/info/").status_code == 200
    secret = client.cookies["segqc_session_8000"]
    assert client.post("/auth/sign-out").headers["location"] == "/auth/sign-in"
    assert client.get("/info/").status_code == 401
    assert client.get("/info/", headers={"Cookie": f"segqc_session_8000={secret}"}).status_code == 401


@pytest.mark.parametrize(
    "page", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)", "", "evil"]
)
def test_nobody_is_sent_elsewhere_after_signing_in(client: TestClient, page: str) -> None:
    assert sign_in(client, "anna", next=page).headers["location"] == "/"
    assert 'name="next" value="/"' in client.get("/auth/sign-in", params={"next": page}).text


def test_names_are_shown_as_text(client: TestClient) -> None:
    answer = sign_in(client, '"><script>x</script>', "wrong")
    assert answer.status_code == 401
    assert "<script>" not in answer.text
    assert "The name or the password is wrong." in answer.text


@pytest.mark.parametrize("name", ["anna", "nobody at all", "", "a" * 5000, "\udcff"])
def test_a_wrong_password_and_an_unknown_user_look_alike(client: TestClient, name: str) -> None:
    sent = name.encode("utf-8", "surrogateescape")
    answer = client.post(
        "/auth/token", content=b"username=%s&password=wrong" % sent,
        headers={"content-type": "application/x-www-form-urlencoded"},
    )  # fmt: skip
    if name:
        assert (answer.status_code, answer.json()["detail"]) == (401, "the name or the password is wrong.")
    else:
        assert answer.status_code in (401, 422)
    assert "wrong" not in answer.text.replace("is wrong", "")


def test_guessing_is_slowed_with_a_status_of_its_own(app: FastAPI, client: TestClient) -> None:
    clock = Seconds()
    app.state.auth = dataclasses.replace(app.state.auth, desk=Desk(app.state.auth.settings, Throttle(clock)))
    wrong = {"username": "anna", "password": "wrong"}
    statuses = [client.post("/auth/token", data=wrong).status_code for _ in range(FREE_OF_USER + 1)]
    assert statuses == [401] * FREE_OF_USER + [429]
    answer = client.post("/auth/token", data={"username": "ANNA", "password": PASSWORD})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    page = sign_in(client, "anna")
    assert (page.status_code, page.headers["retry-after"]) == (429, "2")
    assert "try again in 2 seconds" in page.text
    clock.now += 2
    assert sign_in(client, "anna").status_code == 303


def test_an_application_that_is_not_told_where_it_listens_demands_signing_in(folder: Path) -> None:
    from monailabel.config import settings

    from segqc.server.app import create_app

    with application(folder):
        settings.MONAI_LABEL_APP_CONF = {"bootstrap": "false"}
        assert TestClient(create_app()).get("/info/").status_code == 401


def test_monai_labels_own_sign_in_is_refused_in_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monailabel.config import settings

    from segqc.server.app import create_app

    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_ENABLE", True)
    with pytest.raises(SettingsError, match=r"MONAI_LABEL_AUTH_ENABLE: users sign in by the settings \[auth\]"):
        create_app()


def test_cookies_are_secure_behind_a_proxy_with_tls(folder: Path) -> None:
    (folder / "segqc.toml").write_text(f'{CONFIG}\n[auth]\ntrusted_proxies = ["10.0.0.0/24"]\nsession_hours = 1\n')
    try:
        with application(folder, sign_in=True) as made, TestClient(made, client=("10.0.0.9", 1)) as client:
            client.headers["X-Forwarded-Proto"] = "https"
            cookie = client.post(
                "/auth/sign-in", data={"username": "anna", "password": PASSWORD}, follow_redirects=False
            ).headers["set-cookie"]
        assert "Secure" in cookie
        assert "Max-Age=3600" in cookie
    finally:
        (folder / "segqc.toml").write_text(CONFIG)


@pytest.mark.parametrize(
    ("method", "headers", "refused"),
    [
        ("POST", {"Origin": EVIL}, True),
        ("POST", {"Origin": "null"}, True),
        ("POST", {"Sec-Fetch-Site": "cross-site"}, True),
        ("POST", {"Sec-Fetch-Site": "same-site"}, True),
        ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, True),
        ("PUT", {"Sec-Fetch-Site": "cross-site"}, True),
        ("DELETE", {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"}, True),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, True),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, False),
        ("POST", {"Sec-Fetch-Site": "same-origin", "Origin": "http://testserver"}, False),
        ("POST", {"Sec-Fetch-Site": "none"}, False),
        ("POST", {}, False),
    ],
)
def test_pages_of_other_sites_change_nothing(
    client: TestClient, method: str, headers: dict[str, str], refused: bool
) -> None:
    sign_in(client, "otto")
    path = {"POST": "/segqc/leases/scan_0/skip", "GET": "/info/", "PUT": "/datastore/image/info?image=scan_0",
            "DELETE": "/train/"}[method]  # fmt: skip
    assert (client.request(method, path, headers=headers, json={"reason": "x"}).status_code == 403) is refused


def test_signing_in_from_another_sites_page_is_refused(client: TestClient) -> None:
    for headers in ({"Origin": EVIL}, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}):
        answer = client.post("/auth/sign-in", data={"username": "anna", "password": PASSWORD}, headers=headers)
        assert answer.status_code == 403
    assert not client.cookies


def test_who_did_it_is_who_is_signed_in_whatever_the_client_calls_itself(
    folder: Path, client: TestClient, tmp_path: Path
) -> None:
    write_labels(draw_case(0)[1], tmp_path / "mask.nii.gz")
    headers = bearer(client, "anna")
    sample = client.post(
        "/activelearning/segqc?client_id=mallory", json={"client_id": "mallory"}, headers=headers
    ).json()
    with (tmp_path / "mask.nii.gz").open("rb") as file:
        kept = client.put(
            f"/datastore/label?image={sample['id']}&tag=final&client_id=mallory",
            data={"params": json.dumps({"client_id": "mallory"})},
            files={"label": file},
            headers=headers,
        )
    assert kept.status_code == 200, kept.text
    refused = client.post(f"/segqc/review/{sample['id']}", json={"decision": "approve"}, headers=headers)
    assert refused.status_code == 403
    noted = {"params": json.dumps({"segmentationMeta": {"status": "approved", "level": "easy", "comment": ""}})}
    for path in ("/datastore/label/info", "/datastore/updatelabelinfo"):
        by_note = client.put(
            f"{path}?label={sample['id']}&tag=final", data={**noted, "info": noted["params"]}, headers=headers
        )
        assert (by_note.status_code, by_note.json()["detail"]) == (
            403, "a review needs the role 'reviewer', and yours is 'annotator'."
        )  # fmt: skip
    reviewer = bearer(client, "rita")
    assert client.post(
        f"/segqc/review/{sample['id']}", json={"decision": "approve", "client_id": "mallory"}, headers=reviewer
    ).json()["state"] == "approved"  # fmt: skip
    with Dataset(folder).store.read() as transaction:
        handed_out = [lease.actor for lease in leases.listing(transaction) if lease.scan == sample["id"]]
        made = [version.actor for version in labels.history(transaction, sample["id"])]
    told = client.get(f"/segqc/events/{sample['id']}", headers=headers).json()
    by = {event["verb"]: (event["actor"]["name"], event["actor"]["identified_by"]) for event in told}
    assert {(a.name, a.identified_by) for a in (*handed_out, *made)} == {("anna", "signed-in")}
    assert by["approved"] == ("rita", "signed-in")
    assert "mallory" not in json.dumps(told)


def test_what_a_reviewer_approved_an_annotator_does_not_label_anew(
    folder: Path, client: TestClient, tmp_path: Path
) -> None:
    write_labels(draw_case(0)[1], tmp_path / "mask.nii.gz")
    anna, rita = bearer(client, "anna"), bearer(client, "rita")

    def submit(headers: dict[str, str], tag: str = "final") -> httpx.Response:
        files = {"label": ("mask.nii.gz", (tmp_path / "mask.nii.gz").read_bytes())}
        return client.put(
            f"/datastore/label?image=scan_0&tag={tag}", data={"params": "{}"}, files=files, headers=headers
        )

    assert submit(anna).status_code == 200
    assert client.post("/segqc/review/scan_0", json={"decision": "approve"}, headers=rita).status_code == 200
    refused = submit(anna)
    assert refused.status_code == 403
    assert refused.json()["detail"] == (
        "the scan 'scan_0' is approved: only a reviewer may reopen it or give it another final label."
    )
    found = client.get("/segqc/dicomweb/scan_0", headers=anna).json()
    shown = client.get(f"/segqc/viewer/scans/{found['study']}", headers=anna).json()
    voxels = client.get(f"/segqc/viewer/scans/{found['study']}/labels/{shown['label']['version']}", headers=anna)
    again = client.post(
        f"/segqc/viewer/scans/{found['study']}/label",
        data={"params": json.dumps({"instances": shown["instances"], "started_from": shown["label"]["version"]})},
        files={"voxels": voxels.content},
        headers=anna,
    )
    assert (again.status_code, again.json()["detail"]) == (403, refused.json()["detail"])
    with Dataset(folder).store.read() as transaction:
        assert scans.get(transaction, "scan_0").state == "approved"
    assert submit(anna, "version_1").status_code == 200
    assert submit(rita).status_code == 200


def test_a_job_is_whose_token_asked_for_it(folder: Path, client: TestClient) -> None:
    add_models(folder)
    answer = client.post("/scoring/tta", json={"client_id": "mallory"}, headers=bearer(client, "anna"))
    assert answer.status_code == 200, answer.text
    with Dataset(folder).store.read() as transaction:
        assert jobs.open_jobs(transaction, "scoring")[-1].actor.name == "anna"
    assert client.delete("/scoring/", headers=bearer(client, "otto")).status_code == 200


# --------------------------------------------------------------------------------------- as MONAI Label's clients call


class Slicer:
    """What 3D Slicer's extension does (its `MONAILabelLogic._client`), with what was typed into its dialog."""

    def __init__(self, url: str, folder: Path, username: str, password: str) -> None:
        self.url, self.folder, self.username, self.password = url, folder, username, password
        self.auth_token: dict[str, object] | None = None

    def client(self) -> MONAILabelClient:
        made = MONAILabelClient(self.url, str(self.folder), "user-xyz")
        if made.auth_enabled():
            if self.auth_token:
                made.update_auth(self.auth_token)
            if not self.auth_token or not made.auth_valid_token():
                self.auth_token = made.auth_token(self.username, self.password)
                made.update_auth(self.auth_token)
        return made


@pytest.mark.server
def test_3d_slicer_signs_in_downloads_and_submits(folder: Path, tmp_path: Path) -> None:
    with listening(folder, sign_in=True) as url:
        with pytest.raises(MONAILabelClientException):
            MONAILabelClient(url).info()
        with pytest.raises(MONAILabelClientException, match="the name or the password is wrong"):
            Slicer(url, tmp_path, "anna", "wrong").client()
        slicer = Slicer(url, tmp_path, "anna", PASSWORD)
        assert slicer.client().info()["name"] == "SegQC"
        first = slicer.auth_token
        sample = slicer.client().next_sample("segqc", {})
        assert slicer.auth_token == first, "a token that counts is used again"
        image, other = f"{url}/datastore/image?image={sample['id']}", f"{url}/datastore/image?image=scan_x"
        forwarded = {"X-Forwarded-For": "10.0.0.7"}
        assert httpx.get(image, headers=forwarded).status_code == 401, "a proxy's address is everybody's"
        # its SampleData module downloads without a token, and tries three times
        assert [httpx.get(address).status_code for address in (other, image, image, image, image)] == [
            401, 200, 200, 200, 401
        ]  # fmt: skip
        mask = tmp_path / "mask.nii.gz"
        write_labels(draw_case(1)[1], mask)
        slicer.client().save_label(sample["id"], str(mask), params={"label_names": {"liver": 1, "spleen": 4}})
        with Dataset(folder).store.write() as transaction:
            version = labels.history(transaction, sample["id"])[-1]
            users.end_all(transaction, "anna", version.actor)
        assert (version.actor.name, version.actor.identified_by) == ("anna", "signed-in")
        assert slicer.client().info()["name"] == "SegQC"
        assert slicer.auth_token != first, "the next one is fetched when one has ended"
        with pytest.raises(MONAILabelClientException, match=r"needs the role .*operator"):
            slicer.client().train_start("segqc", {})


def test_downloads_are_allowed_for_a_while_to_one_address_and_off_by_a_setting() -> None:
    clock = Seconds()
    who = Identity(role="annotator", actor=None, by_token=True)
    downloads = Downloads(600, clock)
    downloads.allow("10.0.0.1", "scan_0", who)
    assert downloads.take("10.0.0.2", "scan_0") is None
    assert downloads.take("10.0.0.1", "scan_1") is None
    assert downloads.take("10.0.0.1", "scan_0") == who
    clock.now += 601
    assert downloads.take("10.0.0.1", "scan_0") is None
    off = Downloads(0, clock)
    off.allow("10.0.0.1", "scan_0", who)
    assert off.take("10.0.0.1", "scan_0") is None


def test_a_session_does_not_open_downloads(client: TestClient) -> None:
    sign_in(client, "rita")
    sample = client.post("/activelearning/segqc", json={}).json()
    client.cookies.clear()
    assert client.get(f"/datastore/image?image={sample['id']}").status_code == 401


# ----------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("host", "settings", "demanded"),
    [("127.0.0.1", {}, False), ("localhost", {}, False), ("::1", {}, False), ("127.0.0.1", {"sign_in": True}, True),
     ("0.0.0.0", {}, True), ("::", {}, True), ("10.0.0.1", {}, True), ("segqc.example.org", {}, True), (None, {}, True),
     ("0.0.0.0", {"sign_in": False}, False), (None, {"sign_in": False}, False), ("127.0.0.1", PROXY, True),
     ("127.0.0.1", {"oidc": {"issuer": "https://sso.example.org", "client_id": "segqc"}}, True)],
)  # fmt: skip
def test_users_sign_in_but_on_this_machine_only(host: str | None, settings: dict[str, object], demanded: bool) -> None:
    assert AuthSettings.model_validate(settings).demands_sign_in(host) is demanded


@pytest.mark.parametrize("sign_in", [None, True])
def test_a_server_that_nobody_could_sign_in_to_does_not_start(tmp_path: Path, sign_in: bool | None) -> None:
    made = make_dataset(tmp_path / "studies", scans=1, finals=0)
    with pytest.raises(ServeError, match=r"segqc users add .* NAME"):
        serve(made, host="0.0.0.0" if sign_in is None else "127.0.0.1", sign_in=sign_in, worker=False)
