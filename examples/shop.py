"""A small shop: templates, a cart in the session, a JSON API and a stream of events.

Plain Flask that knows nothing of the bus. ``flask --app shop run`` serves it alone,
``flaskbus-agent shop:app --prefix /shop`` behind a gateway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from flask import Flask, Response, abort, redirect, render_template, request, session, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as BaseResponse

app = Flask(__name__, template_folder="templates/shop")
app.config.from_mapping(
    # All agents of an app need the same key: SHOP_SECRET_KEY in production.
    SECRET_KEY="development only",
    # Flask's cookie is for the whole host, so two apps behind one port need two names.
    SESSION_COOKIE_NAME="shop",
    SESSION_COOKIE_SAMESITE="Lax",
)
app.config.from_prefixed_env("SHOP")


@dataclass(frozen=True)
class Product:
    """Something to buy; ``price`` in cents."""

    sku: str
    name: str
    price: int


PRODUCTS = {
    product.sku: product
    for product in (
        Product("kettle", "Enamel kettle", 3900),
        Product("mug", "Stoneware mug", 1450),
        Product("tea", "Green tea, 100 g", 890),
        Product("tray", "Walnut tray", 5200),
    )
}
MOST_OF_ONE = 99


@app.template_filter()
def money(cents: int) -> str:
    return f"€ {cents // 100}.{cents % 100:02d}"


@app.get("/")
def home() -> str:
    return render_template("home.html", products=PRODUCTS.values(), count=sum(cart().values()))


@app.get("/cart")
def show_cart() -> str:
    lines = [(PRODUCTS[sku], count) for sku, count in cart().items()]
    total = sum(product.price * count for product, count in lines)
    return render_template("cart.html", lines=lines, total=total)


@app.post("/cart")
def add_to_cart() -> BaseResponse:
    product = find(request.form.get("sku", ""))
    content = cart()
    content[product.sku] = min(content.get(product.sku, 0) + 1, MOST_OF_ONE)
    session["cart"] = content
    return redirect(url_for("show_cart"), 303)


@app.post("/cart/empty")
def empty_cart() -> BaseResponse:
    session.pop("cart", None)
    return redirect(url_for("home"), 303)


@app.get("/api/products")
def list_products() -> dict[str, object]:
    return {
        "products": [
            asdict(product) | {"url": url_for("show_product", sku=product.sku)}
            for product in PRODUCTS.values()
        ]
    }


@app.get("/api/products/<sku>")
def show_product(sku: str) -> dict[str, object]:
    return asdict(find(sku))


@app.get("/clock")
def clock() -> Response:
    """The time as server-sent events, once a second for a minute; an EventSource reconnects by itself."""

    def events() -> Iterator[str]:
        for number in range(60):
            yield f"id: {number}\ndata: {time.strftime('%H:%M:%S')}\n\n"
            time.sleep(1)

    return Response(events(), mimetype="text/event-stream", headers={"Cache-Control": "no-store"})


@app.errorhandler(HTTPException)
def show_error(error: HTTPException) -> tuple[dict[str, object] | str, int]:
    """JSON under /api/, a page elsewhere."""
    status = error.code or 500
    if request.path.startswith("/api/"):
        return {"error": error.name, "detail": error.description}, status
    return render_template("error.html", error=error), status


def cart() -> dict[str, int]:
    """What is in the visitor's cart: SKU to count."""
    return {sku: count for sku, count in session.get("cart", {}).items() if sku in PRODUCTS}


def find(sku: str) -> Product:
    return PRODUCTS.get(sku) or abort(404, f"There is no product {sku!r}.")
