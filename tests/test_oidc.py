"""Signing in at an OpenID provider, with one on this machine whose signatures are real."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import httpx
from fastapi import FastAPI
from fastapi.testclient import TestClient
from joserfc.jwk import OctKey, RSAKey

from segqc.loop.dataset import Dataset
from segqc.server.auth.oidc import FLOW_SECONDS, Provider
from segqc.server.auth.setup import add_auth
from segqc.server.errors import RequestError
from segqc.settings import AuthSettings, OidcSettings
from segqc.store import events, users
from segqc.store.events import SERVER
from segqc.store.store import Store
from tests.oidc_kit import CLIENT_ID, CLIENT_SECRET, FakeProvider, running_provider
from tests.server_kit import application, make_dataset

CONFIG = """
[auth.oidc]
issuer = "{issuer}"
client_id = "segqc"
client_secret = "a secret of the client"
role_claim = "realm_access.roles"
roles = {{ "segqc-annotators" = "annotator", "segqc-reviewers" = "reviewer" }}
"""
ROLES = {"realm_access": {"roles": ["offline_access", "segqc-annotators", "segqc-reviewers"]}}


class Seconds:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def provider() -> Iterator[FakeProvider]:
    with running_provider() as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.open(tmp_path)
    yield made
    made.close()


def oidc(provider: FakeProvider, **more: object) -> OidcSettings:
    return OidcSettings.model_validate(
        {
            "issuer": provider.issuer,
            "client_id": CLIENT_ID,
            "client_secret": CLIENT_SECRET,
            "role_claim": "realm_access.roles",
            "roles": {"segqc-annotators": "annotator", "segqc-reviewers": "reviewer"},
            **more,
        }
    )


@pytest.fixture
def client(provider: FakeProvider, store: Store) -> TestClient:
    """A browser, and a server of the sign-in routes alone."""
    from segqc.server.app import _add_error_handlers
    from segqc.server.auth.routes import router

    app = FastAPI()
    add_auth(app, AuthSettings(oidc=oidc(provider)), lambda: store, sign_in=True, port=8000)
    app.include_router(router)
    _add_error_handlers(app)
    return TestClient(app, follow_redirects=False)


def sign_in(client: TestClient, **changed: str) -> httpx.Response:
    """What a browser does, from the link on the sign-in page to what comes after the provider."""
    begun = client.get("/auth/oidc?next=/ohif/segqc%3Fa=b")
    assert begun.status_code == 303, begun.text
    assert all(part in begun.headers["set-cookie"] for part in ("HttpOnly", "SameSite=lax", "Path=/auth/oidc"))
    at_provider = httpx.get(begun.headers["location"])
    assert at_provider.status_code == 302
    back = httpx.URL(at_provider.headers["location"])
    assert (back.host, back.path) == ("testserver", "/auth/oidc/callback")
    return client.get("/auth/oidc/callback", params={**back.params, **changed})


def test_a_user_signs_in_at_the_provider(client: TestClient, provider: FakeProvider, store: Store) -> None:
    provider.claims = ROLES
    assert "Sign in at 127.0.0.1" in client.get("/auth/sign-in").text
    answer = sign_in(client)
    assert (answer.status_code, answer.headers["location"]) == (303, "/ohif/segqc?a=b")
    assert client.get("/auth/token/valid").json() == {
        "username": "nora", "name": "nora", "email": None, "roles": ["reviewer"], "identified_by": "oidc"
    }  # fmt: skip
    with store.read() as transaction:
        user = users.get(transaction, "nora")
        told = [(e.verb, e.actor.name, e.actor.identified_by) for e in events.history(transaction, "user", user.id)]
    assert (user.has_password, user.provider_subject) == (False, f"{provider.issuer} id of nora")
    assert told == [("added", "nora", "oidc"), ("signed in", "nora", "oidc")]
    provider.claims = {"realm_access": {"roles": ["segqc-annotators"]}}
    assert sign_in(client).status_code == 303
    assert client.get("/auth/token/valid").json()["roles"] == ["annotator"], "groups count anew with each sign-in"


def test_roles_may_come_beside_the_token(client: TestClient, provider: FakeProvider) -> None:
    provider.userinfo = ROLES
    assert sign_in(client).status_code == 303
    assert client.get("/auth/token/valid").json()["roles"] == ["reviewer"]
    provider.userinfo = {**ROLES, "sub": "somebody else"}
    provider.name = "otto"
    assert sign_in(client).status_code == 409


def test_who_has_no_role_gets_a_sentence(client: TestClient, provider: FakeProvider, store: Store) -> None:
    provider.claims = {"realm_access": {"roles": ["visitors"]}}
    answer = sign_in(client)
    assert answer.status_code == 409
    assert "Nobody has said what &#39;nora&#39; may do here" in answer.text
    assert client.get("/auth/token/valid").status_code == 401
    with store.write() as transaction:
        users.add(transaction, "Nora", "operator", None, SERVER)
    assert sign_in(client).status_code == 303
    assert client.get("/auth/token/valid").json()["roles"] == ["operator"]


def test_a_local_users_name_is_not_given_away(client: TestClient, provider: FakeProvider, store: Store) -> None:
    provider.claims = ROLES
    with store.write() as transaction:
        users.add(transaction, "nora", "operator", "a hash", SERVER)
    answer = sign_in(client)
    assert answer.status_code == 409
    assert "another user" in answer.text
    assert client.get("/auth/token/valid").status_code == 401


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"nonce": "another"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"aud": "another client"}, "aud"),
        ({"aud": [CLIENT_ID, "another client"], "azp": "another client"}, "azp"),
        ({"iss": "https://evil.example"}, "iss"),
        ({"iss": None}, "iss"),
        ({"exp": 1_600_000_000}, "expired"),
        ({"exp": None}, "exp"),
        ({"iat": None}, "iat"),
        ({"sub": None}, "sub"),
        ({"preferred_username": None}, "preferred_username"),
        ({"preferred_username": ["nora"]}, "preferred_username"),
    ],
)
def test_a_token_with_wrong_claims_is_not_believed(
    client: TestClient, provider: FakeProvider, store: Store, claims: dict[str, Any], why: str
) -> None:
    provider.claims = {**ROLES, **claims}
    answer = sign_in(client)
    assert answer.status_code == 401
    assert why in answer.text
    assert "segqc_session_8000" not in client.cookies
    with store.read() as transaction:
        assert users.listing(transaction) == []


@pytest.mark.parametrize("how", ["another key", "a shared secret", "no signature"])
def test_a_token_with_a_wrong_signature_is_not_believed(client: TestClient, provider: FakeProvider, how: str) -> None:
    provider.claims = ROLES
    if how == "another key":
        provider.signs_with = RSAKey.generate_key(2048, {"kid": "1"})
    else:
        provider.signs_with = OctKey.import_key(CLIENT_SECRET * 2)
        provider.algorithm = "HS256" if how == "a shared secret" else "none"
    answer = sign_in(client)
    assert answer.status_code == 401
    assert "cannot be believed" in answer.text


def test_a_new_key_of_the_provider_is_fetched(client: TestClient, provider: FakeProvider) -> None:
    provider.claims = ROLES
    assert sign_in(client).status_code == 303
    assert sign_in(client).status_code == 303
    assert provider.asked.count("/realm/keys") == 1
    provider.key = RSAKey.generate_key(2048, {"kid": "2"})
    assert sign_in(client).status_code == 303


@pytest.mark.parametrize("changed", [{"state": "another"}, {"state": ""}, {"code": "another"}, {"code": ""}])
def test_an_answer_of_another_sign_in_is_refused(
    client: TestClient, provider: FakeProvider, changed: dict[str, str]
) -> None:
    provider.claims = ROLES
    assert sign_in(client, **changed).status_code == 401
    assert "segqc_session_8000" not in client.cookies


def test_another_browsers_answer_is_refused(client: TestClient, provider: FakeProvider) -> None:
    provider.claims = ROLES
    begun = client.get("/auth/oidc")
    back = httpx.URL(httpx.get(begun.headers["location"]).headers["location"])
    client.cookies.clear()
    assert client.get(f"/auth/oidc/callback?{back.query.decode()}").status_code == 401


def test_an_answer_counts_once(client: TestClient, provider: FakeProvider) -> None:
    provider.claims = ROLES
    begun = client.get("/auth/oidc")
    back = httpx.URL(httpx.get(begun.headers["location"]).headers["location"])
    cookies = {"Cookie": f"segqc_session_8000_oidc={back.params['state']}"}
    statuses = [client.get(f"/auth/oidc/callback?{back.query.decode()}", headers=cookies).status_code for _ in "ab"]
    assert statuses == [303, 401]


def test_who_is_refused_there_is_told_so(client: TestClient, provider: FakeProvider) -> None:
    provider.refuses = "access_denied"
    answer = sign_in(client)
    assert answer.status_code == 401
    assert "did not sign you in (access_denied)" in answer.text


def test_a_provider_that_is_away_or_another_one_is_named(client: TestClient, provider: FakeProvider) -> None:
    provider.named_issuer = "https://evil.example"
    answer = client.get("/auth/oidc")
    assert answer.status_code == 503
    assert "calls itself &#39;https://evil.example&#39;" in answer.text
    away = Provider(oidc(provider, issuer="http://127.0.0.1:9/realm"))
    with pytest.raises(RequestError, match="does not answer") as refused:
        away.begin("http://127.0.0.1/auth/oidc/callback", "/")
    assert refused.value.status == 503


def test_who_takes_too_long_begins_again(provider: FakeProvider) -> None:
    clock = Seconds()
    made = Provider(oidc(provider), clock)
    address, state = made.begin("http://127.0.0.1/auth/oidc/callback", "/")
    code = httpx.URL(httpx.get(address).headers["location"]).params["code"]
    clock.now += FLOW_SECONDS + 1
    with pytest.raises(RequestError, match="too long ago"):
        made.finish(state, code)


def test_the_whole_server_signs_in_at_the_provider(provider: FakeProvider, tmp_path: Path) -> None:
    provider.claims = ROLES
    folder = make_dataset(tmp_path / "studies", scans=1, finals=0, config=CONFIG.format(issuer=provider.issuer))
    with application(folder, sign_in=True) as app, TestClient(app, follow_redirects=False) as browser:
        assert browser.get("/info/").status_code == 401
        assert sign_in(browser).status_code == 303
        assert browser.get("/info/").status_code == 200
        assert browser.post("/train/").status_code == 403
        browser.post("/activelearning/segqc", json={"client_id": "mallory"})
    with Dataset(folder).store.read() as transaction:
        assert {e.actor.name for e in events.history(transaction, "scan", 1) if e.verb == "handed out"} == {"nora"}


def test_a_providers_user_gets_a_token_for_3d_slicer(provider: FakeProvider, tmp_path: Path) -> None:
    provider.claims = ROLES
    folder = make_dataset(tmp_path / "studies", scans=1, finals=0, config=CONFIG.format(issuer=provider.issuer))
    with application(folder, sign_in=True) as app, TestClient(app, follow_redirects=False) as browser:
        assert browser.post("/auth/tokens").status_code == 401
        sign_in(browser)
        assert "Make a token" in browser.get("/auth/tokens").text
        shown = browser.post("/auth/tokens")
        assert shown.headers["cache-control"] == "no-store"
        found = re.search(r'readonly value="([^"]+)"', shown.text)
        assert found is not None
        browser.cookies.clear()
        assert browser.post("/auth/token", data={"username": "otto", "password": found[1]}).status_code == 401
        given = browser.post("/auth/token", data={"username": "Nora", "password": found[1]}).json()
        headers = {"Authorization": f"{given['token_type']} {given['access_token']}"}
        assert browser.get("/auth/token/valid", headers=headers).json()["identified_by"] == "oidc"
        page = browser.post("/auth/sign-in", data={"username": "nora", "password": found[1]})
        assert page.status_code == 401, "a program's token opens no browser session"


def test_without_a_provider_there_is_nothing_to_sign_in_at(store: Store) -> None:
    from segqc.server.auth.routes import router

    app = FastAPI()
    add_auth(app, AuthSettings(), lambda: store, sign_in=True, port=8000)
    app.include_router(router)
    client = TestClient(app, follow_redirects=False)
    for path in ("/auth/oidc", "/auth/oidc/callback?state=a&code=b"):
        assert client.get(path).status_code == 404
    assert "/auth/oidc" not in client.get("/auth/sign-in").text
