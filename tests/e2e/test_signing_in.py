"""A user signs in with a browser and works in OHIF; also where an OpenID provider signs them in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

import requests

from segqc.loop.dataset import Dataset
from tests.auth_kit import PASSWORD, add_users, quick_hashes
from tests.browser_kit import accessible, keep_picture, wait_for_slice, watched
from tests.oidc_kit import running_provider
from tests.server_kit import CONFIG, listening, make_dataset

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.server


def study_of(server: str, scan: str) -> str:
    form = {"username": "anna", "password": PASSWORD}
    token = requests.post(f"{server}/auth/token", data=form, timeout=30).json()["access_token"]
    headers = {"Authorization": f"Bearer {token}"}
    study: str = requests.get(f"{server}/segqc/dicomweb/{scan}", headers=headers, timeout=30).json()["study"]
    return study


def test_a_link_to_a_scan_leads_through_the_sign_in_page(browser: Browser, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "studies", scans=1, finals=0)
    with quick_hashes():
        add_users(Dataset(folder).store)
        with listening(folder, sign_in=True) as server, watched(browser) as (context, log):
            page = context.new_page()
            page.goto(f"{server}/ohif/segqc?StudyInstanceUIDs={study_of(server, 'scan_0')}")
            page.get_by_label("Name").fill("anna")
            page.get_by_label("Password").fill("wrong")
            page.keyboard.press("Enter")
            assert page.get_by_role("alert").inner_text() == "The name or the password is wrong."
            assert page.get_by_label("Name").input_value() == "anna"
            keep_picture(page, tmp_path, "sign-in")
            page.get_by_label("Password").fill(PASSWORD)
            page.get_by_role("button", name="Sign in").click()
            wait_for_slice(page)
            page.locator("segqc-panel").wait_for()
            keep_picture(page, tmp_path, "scan")
            assert [error for error in log.errors if "401" in error] == log.errors[:1], "only the wrong password"
            assert "ohif/segqc" in page.url
            sign_out(page, server)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_signing_in_and_what_is_not_allowed_look_like_the_pages(browser: Browser, tmp_path: Path, theme: str) -> None:
    folder = make_dataset(tmp_path / "studies", scans=1)
    with quick_hashes():
        add_users(Dataset(folder).store)
        with listening(folder, sign_in=True) as server:
            # axe is put into the page, which its own policy forbids
            context = browser.new_context(color_scheme=theme, bypass_csp=True)
            page = context.new_page()
            page.goto(server)
            accessible(page)
            page.get_by_label("Name").fill("anna")
            page.get_by_label("Password").fill("wrong")
            page.keyboard.press("Enter")
            page.get_by_role("alert").wait_for()
            accessible(page)
            grounds = [ground_of(page)]
            page.get_by_label("Password").fill(PASSWORD)
            page.keyboard.press("Enter")
            page.get_by_role("heading", name="Queue").wait_for()
            grounds.append(ground_of(page))
            post(page, "/scans/scan_0/review")
            page.get_by_role("heading", name="This is not allowed").wait_for()
            assert page.get_by_text("This needs the role 'reviewer'").is_visible()
            accessible(page)
            keep_picture(page, tmp_path, f"forbidden-{theme}")
            assert grounds == [ground_of(page)] * 2, "one style"
            context.close()


def ground_of(page: Page) -> str:
    ground: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return ground


def post(page: Page, address: str) -> None:
    """Post as a form of a page would."""
    page.evaluate(
        """address => { const form = document.createElement('form'); form.method = 'post'; form.action = address;
                        form.innerHTML = '<input name="decision" value="approve">';
                        document.body.append(form); form.submit(); }""",
        address,
    )


def sign_out(page: Page, server: str) -> None:
    """Sign out, and see that the session has ended."""
    post(page, "/auth/sign-out")
    page.wait_for_url("**/auth/sign-in")
    page.goto(f"{server}/openapi.json")
    assert "/auth/sign-in?next=%2Fopenapi.json" in page.url


def test_a_provider_signs_a_user_in(browser: Browser, tmp_path: Path) -> None:
    with running_provider() as provider:
        provider.claims = {"groups": ["annotators"]}
        config = f"""{CONFIG}
[auth.oidc]
issuer = "{provider.issuer}"
client_id = "segqc"
client_secret = "a secret of the client"
roles = {{ annotators = "annotator" }}
"""
        folder = make_dataset(tmp_path / "studies", scans=1, finals=0, config=config)
        with listening(folder, sign_in=True) as server, watched(browser) as (context, _):
            page = context.new_page()
            page.goto(f"{server}/auth/token/valid")
            page.get_by_role("link", name="Sign in at 127.0.0.1").click()
            page.wait_for_url("**/auth/token/valid")
            assert '"username":"nora"' in page.content()
            page.goto(f"{server}/auth/tokens")
            page.get_by_role("button", name="Make a token").click()
            assert len(page.get_by_label("Token").input_value()) > 40
            keep_picture(page, tmp_path, "token")
