"""A small blog: a factory, a blueprint, forms with flashed messages, and SQLite.

Plain Flask that knows nothing of the bus. ``flask --app blog run`` serves it alone,
``flaskbus-agent blog:app --prefix /blog`` behind a gateway.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import cast

from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    current_app,
    flash,
    g,
    redirect,
    render_template,
    request,
    url_for,
)
from werkzeug.wrappers import Response as BaseResponse

SCHEMA = """
CREATE TABLE IF NOT EXISTS post (
    id      INTEGER PRIMARY KEY,
    title   TEXT NOT NULL,
    text    TEXT NOT NULL,
    created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
)
"""

posts = Blueprint("posts", __name__)


def create_app(database: str | Path | None = None) -> Flask:
    """The app over an SQLite file; without one, ``BLOG_DATABASE`` or a file in Flask's instance folder."""
    app = Flask(__name__, template_folder="templates/blog")
    app.config.from_mapping(
        SECRET_KEY="development only",
        SESSION_COOKIE_NAME="blog",
        SESSION_COOKIE_SAMESITE="Lax",
        DATABASE=Path(app.instance_path) / "blog.sqlite",
    )
    app.config.from_prefixed_env("BLOG")
    if database is not None:
        app.config["DATABASE"] = database
    app.register_blueprint(posts)
    app.teardown_appcontext(disconnect)
    return app


def connection() -> sqlite3.Connection:
    """The request's own connection: SQLite's are not to be shared between threads."""
    if "connection" not in g:
        path = Path(current_app.config["DATABASE"])
        path.parent.mkdir(parents=True, exist_ok=True)
        g.connection = sqlite3.connect(path)
        g.connection.row_factory = sqlite3.Row
        g.connection.execute(SCHEMA)
    return cast(sqlite3.Connection, g.connection)


def disconnect(_error: BaseException | None) -> None:
    if "connection" in g:
        g.connection.close()


def find(number: int) -> sqlite3.Row:
    row = connection().execute("SELECT * FROM post WHERE id = ?", (number,)).fetchone()
    return cast(sqlite3.Row, row) if row else abort(404)


def newest(count: int) -> list[sqlite3.Row]:
    return connection().execute("SELECT * FROM post ORDER BY id DESC LIMIT ?", (count,)).fetchall()


@posts.get("/")
def index() -> str:
    return render_template("index.html", posts=newest(20))


@posts.get("/<int:number>")
def show(number: int) -> str:
    return render_template("post.html", post=find(number))


@posts.route("/new", methods=["GET", "POST"])
def write() -> str | BaseResponse | tuple[str, int]:
    if request.method == "GET":
        return render_template("write.html")
    title, text = (request.form.get(name, "").strip() for name in ("title", "text"))
    if not title or not text:
        flash("A post needs a title and a text.")
        return render_template("write.html"), 422
    with connection() as database:
        number = database.execute("INSERT INTO post (title, text) VALUES (?, ?)", (title, text)).lastrowid
    flash("Published.")
    return redirect(url_for(".show", number=number), 303)


@posts.post("/<int:number>/delete")
def delete(number: int) -> BaseResponse:
    with connection() as database:
        database.execute("DELETE FROM post WHERE id = ?", (find(number)["id"],))
    flash("Deleted.")
    return redirect(url_for(".index"), 303)


@posts.get("/feed.xml")
def feed() -> Response:
    """Atom, with absolute links: they are right behind a gateway too."""
    return Response(render_template("feed.xml", posts=newest(20)), mimetype="application/atom+xml")


app = create_app()
