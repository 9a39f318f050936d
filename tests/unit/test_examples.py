"""The example apps, without the bus."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from flask.testing import FlaskClient

# By their package: a bare 'shop' on the path would shadow the modules that other tests make.
from examples import blog, shop

ATOM = "{http://www.w3.org/2005/Atom}"


@pytest.fixture
def shopper() -> FlaskClient:
    return shop.app.test_client()


@pytest.fixture
def writer(tmp_path: Path) -> FlaskClient:
    return blog.create_app(tmp_path / "new" / "blog.sqlite").test_client()


def test_shop_lists_its_products(shopper: FlaskClient) -> None:
    page = shopper.get("/").text
    for product in shop.PRODUCTS.values():
        assert product.name in page
    assert "€ 14.50" in page


def test_cart_adds_up_and_is_emptied(shopper: FlaskClient) -> None:
    for sku in ("mug", "mug", "tea"):
        answer = shopper.post("/cart", data={"sku": sku})
        assert (answer.status_code, answer.location) == (303, "/cart")
    page = shopper.get("/cart").text
    assert "2 × Stoneware mug" in page
    assert "€ 37.90" in page
    assert "Cart (3)" in shopper.get("/").text

    assert shopper.post("/cart/empty").location == "/"
    assert "The cart is empty" in shopper.get("/cart").text


def test_cart_refuses_what_is_not_sold(shopper: FlaskClient) -> None:
    answer = shopper.post("/cart", data={"sku": "<sofa>"})
    assert answer.status_code == 404
    assert "&lt;sofa&gt;" in answer.text
    assert "<sofa>" not in answer.text


def test_cart_has_a_limit(shopper: FlaskClient) -> None:
    for _ in range(shop.MOST_OF_ONE + 1):
        shopper.post("/cart", data={"sku": "tea"})
    assert f"{shop.MOST_OF_ONE} × Green tea" in shopper.get("/cart").text


def test_shop_has_an_api(shopper: FlaskClient) -> None:
    products = shopper.get("/api/products").json
    assert products is not None
    first = products["products"][0]
    assert shopper.get(first["url"]).json == {key: first[key] for key in ("sku", "name", "price")}

    missing = shopper.get("/api/products/sofa")
    assert missing.status_code == 404
    assert missing.json == {"error": "Not Found", "detail": "There is no product 'sofa'."}


def test_links_follow_the_mount(shopper: FlaskClient) -> None:
    mounted = {"SCRIPT_NAME": "/shop"}
    page = shopper.get("/", environ_overrides=mounted).text
    assert 'href="/shop/static/style.css"' in page
    assert 'action="/shop/cart"' in page
    assert shopper.post("/cart", data={"sku": "tea"}, environ_overrides=mounted).location == "/shop/cart"


def test_shop_has_a_style_sheet(shopper: FlaskClient) -> None:
    with shopper.get("/static/style.css") as answer:
        assert answer.mimetype == "text/css"


def test_clock_streams_events(shopper: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    answer = shopper.get("/clock")
    assert answer.mimetype == "text/event-stream"
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    assert [event.split("\n")[0] for event in events] == [f"id: {number}" for number in range(60)]
    assert naps == [1] * 60


def test_sessions_of_the_two_apps_do_not_collide() -> None:
    assert shop.app.config["SESSION_COOKIE_NAME"] != blog.app.config["SESSION_COOKIE_NAME"]


def test_blog_publishes_and_deletes(writer: FlaskClient) -> None:
    assert "Write the first post" in writer.get("/").text

    answer = writer.post("/new", data={"title": "Hello & welcome", "text": "One.\n\nTwo."})
    assert (answer.status_code, answer.location) == (303, "/1")
    page = writer.get("/1").text
    assert "Published." in page
    assert "<h2>Hello &amp; welcome</h2>" in page
    assert "<p>One.</p><p>Two.</p>" in page
    assert "Published." not in writer.get("/1").text
    assert 'href="/1"' in writer.get("/").text

    assert writer.post("/1/delete").location == "/"
    assert "Deleted." in writer.get("/").text
    assert writer.get("/1").status_code == 404
    assert writer.post("/1/delete").status_code == 404


def test_blog_keeps_what_was_typed_when_something_is_missing(writer: FlaskClient) -> None:
    answer = writer.post("/new", data={"title": "Only a title", "text": " "})
    assert answer.status_code == 422
    assert "A post needs a title and a text." in answer.text
    assert 'value="Only a title"' in answer.text


def test_feed_has_absolute_links_that_follow_the_mount(writer: FlaskClient) -> None:
    writer.post("/new", data={"title": "Fish & chips", "text": "With <vinegar>."})
    answer = writer.get("/feed.xml", base_url="https://example.com/blog/")
    assert answer.mimetype == "application/atom+xml"
    entry = ElementTree.fromstring(answer.data).find(f"{ATOM}entry")
    assert entry is not None
    link = entry.find(f"{ATOM}link")
    assert link is not None
    assert link.get("href") == "https://example.com/blog/1"
    assert entry.findtext(f"{ATOM}title") == "Fish & chips"
    assert entry.findtext(f"{ATOM}content") == "With <vinegar>."


def test_two_processes_share_one_database(tmp_path: Path) -> None:
    path = tmp_path / "blog.sqlite"
    blog.create_app(path).test_client().post("/new", data={"title": "Shared", "text": "Yes."})
    assert "Shared" in blog.create_app(path).test_client().get("/").text
