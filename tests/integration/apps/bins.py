"""httpbin as it was installed, and once more under ``wsgiref.validate``."""

from __future__ import annotations

from wsgiref.validate import validator

from httpbin import app

# The validator wants read() to have a size, and werkzeug gives it one only where there is a limit.
app.config["MAX_CONTENT_LENGTH"] = 64 * 1024 * 1024

plain = app.wsgi_app
checked = validator(app.wsgi_app)
