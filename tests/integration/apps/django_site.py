"""A Django project in one module: its admin, sessions, CSRF, messages and static files."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import hashlib
import os
from wsgiref.validate import validator

import django
from django.conf import settings

settings.configure(
    SECRET_KEY="not much of one",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ.get("DJANGO_SITE_DATABASE", ":memory:"),
        }
    },
    INSTALLED_APPS=[
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.messages",
        "django.contrib.staticfiles",
    ],
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ],
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request",
                    "django.contrib.auth.context_processors.auth",
                    "django.contrib.messages.context_processors.messages",
                ]
            },
        }
    ],
    # Hashing is meant to be slow; not here.
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    STATIC_URL="static/",
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
)
django.setup()

from django.contrib import admin  # noqa: E402
from django.contrib.staticfiles.views import serve  # noqa: E402
from django.core.handlers.wsgi import WSGIHandler  # noqa: E402
from django.http import HttpRequest, JsonResponse  # noqa: E402
from django.urls import path, reverse  # noqa: E402
from django.views.decorators.csrf import csrf_exempt  # noqa: E402


def where(request: HttpRequest, name: str = "") -> JsonResponse:
    return JsonResponse(
        {
            "name": name,
            "admin": reverse("admin:index"),
            "url": request.build_absolute_uri(),
            "path": request.path,
            "path_info": request.path_info,
            "secure": request.is_secure(),
        }
    )


@csrf_exempt
def sums(request: HttpRequest) -> JsonResponse:
    return JsonResponse(
        {
            "form": request.POST.dict(),
            "files": {
                each.name: hashlib.file_digest(each.file, "sha256").hexdigest()
                for each in request.FILES.values()
            },
        }
    )


urlpatterns = [
    path("admin/", admin.site.urls),
    path("static/<path:path>", serve, {"insecure": True}),
    path("where", where),
    path("sums", sums),
    path("größe/<str:name>", where),
]

app = validator(WSGIHandler())


def create_database() -> None:
    """Make the tables, and a user ``admin`` with the password ``secret``."""
    from django.contrib.auth.models import User
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    User.objects.create_superuser("admin", "admin@example.com", "secret")


if __name__ == "__main__":
    create_database()
