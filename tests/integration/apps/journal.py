"""A Flask app in the manner of Flask's tutorial: a factory, blueprints, sessions, templates, static files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from wsgiref.validate import validator

from flask import (
    Blueprint,
    Flask,
    abort,
    current_app,
    flash,
    g,
    make_response,
    redirect,
    render_template,
    request,
    send_file,
    session,
    stream_with_context,
    url_for,
)
from werkzeug.wrappers import Response

STYLE = Path(__file__).parent / "static" / "style.css"

auth = Blueprint("auth", __name__, url_prefix="/auth")
entries = Blueprint("entries", __name__, static_folder="static", static_url_path="/assets")


@auth.before_app_request
def load_user() -> None:
    g.user = session.get("name")


@auth.route("/login", methods=["GET", "POST"])
def login() -> Response | str:
    if request.method == "POST":
        if request.form["password"] == "right":
            session.clear()
            session["name"] = request.form["name"]
            flash(f"Welcome, {session['name']}.")
            return redirect(url_for("entries.index"))
        flash("Wrong password.")
    return render_template("login.html")


@auth.get("/logout")
def logout() -> Response:
    session.clear()
    return redirect(url_for("entries.index"))


@entries.get("/")
def index() -> str:
    return render_template("index.html", entries=current_app.config["ENTRIES"])


@entries.post("/add")
def add() -> Response:
    if not g.user:
        abort(403)
    current_app.config["ENTRIES"].append(request.form["text"])
    flash("Added.")
    return redirect(url_for(".index"), 303)


@entries.get("/entry/<int:number>")
def show(number: int) -> str:
    try:
        text: str = current_app.config["ENTRIES"][number - 1]
    except IndexError:
        abort(404)
    return text


@entries.get("/where")
def where() -> dict[str, str | None]:
    return {
        "script_root": request.script_root,
        "path": request.path,
        "url": request.url,
        "base_url": request.base_url,
        "remote": request.remote_addr,
        "external": url_for(".show", number=7, _external=True),
        "asset": url_for(".static", filename="style.css"),
    }


@entries.get("/cookies")
def cookies() -> Response:
    response = make_response("crumbs")
    response.set_cookie("here", "1", path=request.script_root + "/", httponly=True)
    response.set_cookie("everywhere", "2")
    return response


@entries.get("/file")
def file() -> Response:
    return send_file(STYLE, conditional=True)


@entries.get("/stream")
def stream() -> Response:
    def lines() -> Iterator[str]:
        yield f"{request.path}\n"
        yield f"{url_for('.index')} for {session.get('name')}\n"

    return Response(stream_with_context(lines()), mimetype="text/plain")


@entries.get("/empty")
def empty() -> tuple[str, int, dict[str, str]]:
    return "", 204, {"X-Empty": "yes"}


@entries.get("/folder/")
def folder() -> str:
    return "a folder"


@entries.get("/crash")
def crash() -> str:
    raise RuntimeError("as it should")


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.update(SECRET_KEY="test", ENTRIES=[], MAX_CONTENT_LENGTH=1024 * 1024)
    app.register_blueprint(auth)
    app.register_blueprint(entries)
    return app


plain = create_app()
checked = validator(create_app())
written = validator(create_app())  # the one whose entries change
