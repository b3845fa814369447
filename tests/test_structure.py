"""Which part may import which, what is shipped, and what starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("shared", "strategies", "server", "client", "simulations", "configs")
MAY_IMPORT = {
    "shared": {"shared"},
    "strategies": {"shared", "strategies"},
    "server": {"shared", "strategies", "server"},
    "client": {"shared", "client"},
    "simulations": {"shared", "strategies", "server", "client", "simulations", "configs"},
    "configs": set[str](),
}
FLOWER_PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")
WALLS = {  # third party -> where it may be imported, as folders or files
    "pydicom": ("client/data", "simulations/phantoms.py"),
    "highdicom": ("client/data", "simulations/phantoms.py"),
    "pynetdicom": ("client/data",),
    "dicomweb_client": ("client/data",),
    "nibabel": ("client/data",),
    "ray": ("simulations/ray_engine.py",),
    "PIL": ("client/data", "simulations/pictures.py"),
    "opacus": ("client/privacy", "shared/privacy"),
    "dp_accounting": ("client/privacy", "shared/privacy"),
    "cryptography": (
        "shared/keys.py",
        "shared/signing.py",
        "shared/consortium.py",
        "server/rosters.py",
        "server/enrolling.py",
        "shared/certificates.py",
        "shared/enrolment.py",
        "shared/receipt.py",
        "shared/secagg",
        "client/secagg",
        "client/pin.py",
        "client/checkin.py",
        "shared/checkin.py",
        "client/privacy/randomness.py",
        "client/data",
        "server/secagg",
        "server/founding.py",
        "simulations/federation.py",
    ),
    "uvicorn": ("server",),
    "fastapi": ("server",),
    "starlette": ("server",),
    "sqlalchemy": ("server",),
}
FLOWER_PRIVATE = (
    "server/link.py",
    "server/link_grid.py",
    "server/link_inflate.py",
    "server/link_state.py",
    "client/connection.py",
    "client/fleet.py",
    "simulations/grid.py",
    "simulations/ray_engine.py",  # flwr.simulation
)


def sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Level and name of every module that ``path`` imports, at the top or inside a function."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def under(path: Path, places: tuple[str, ...]) -> bool:
    return any(str(path) == place or str(path).startswith(place + "/") for place in places)


def packages() -> list[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: list[str] = tomllib.load(file)["tool"]["setuptools"]["packages"]
    return found


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    folder = path.parts[0]
    for level, name in imports(path):
        assert level == 0, f"{path} imports relatively"
        first, *rest = name.split(".")
        assert first not in FOLDERS, f"{path} imports {name}: write medfl.{name}"
        if first == "medfl":
            assert rest, f"{path} imports all of medfl"
            assert rest[0] in MAY_IMPORT[folder], f"{path} may not import {name}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_third_parties_stay_behind_their_walls(path: Path) -> None:
    for _, name in imports(path):
        places = WALLS.get(name.split(".")[0])
        assert places is None or under(path, places), f"{path} may not import {name}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_only_the_adapters_touch_flowers_private_modules(path: Path) -> None:
    for _, name in imports(path):
        if name.split(".")[0] == "flwr" and name not in FLOWER_PUBLIC:
            assert under(path, FLOWER_PRIVATE), f"{path} may not import {name}"


def test_every_folder_with_code_is_shipped_and_no_other() -> None:
    on_disk = {
        "medfl." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(packages()) == on_disk
    assert len(packages()) == len(set(packages()))
    with_code = {"medfl." + ".".join(path.parent.parts) for path in sources()}
    assert with_code == on_disk


def test_every_top_folder_is_typed() -> None:
    for folder in FOLDERS:
        if folder != "configs":  # data
            assert (ROOT / folder / "py.typed").is_file(), folder


def test_every_file_begins_with_what_it_is() -> None:
    for path in sources():
        assert ast.get_docstring(tree_of(path)), f"{path} has no docstring"


def test_no_code_is_ever_loaded_from_data() -> None:
    """No pickle, no eval, no dotted path from a configuration."""
    banned_modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    banned_calls = {"eval", "exec", "__import__"}
    for path in sources():
        assert not banned_modules & {name.split(".")[0] for _, name in imports(path)}, path
        called = {
            n.func.id for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not banned_calls & called, path


COMMANDS = {
    "medfl-server": "medfl.server.cli",
    "medfl-client": "medfl.client.cli",
    "medfl-sim": "medfl.simulations.cli",
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_version_are_told_without_importing_torch_or_flower(command: str) -> None:
    code = (
        f"import sys; from {COMMANDS[command]} import main\n"
        "for option in ('--help', '--version'):\n"
        "    try: main([option])\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'flwr', 'monai', 'numpy', 'pydicom', 'highdicom', 'scipy', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "exit status: 0 ok" in done.stdout
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"{command} {version}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_does_not_exist_ends_with_status_two(command: str) -> None:
    done = python(f"import sys; from {COMMANDS[command]} import main; sys.exit(main(['--no-such-option']))")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr or "required" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_commands_are_installed_under_their_names() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    assert scripts == {command: f"{module}:main" for command, module in COMMANDS.items()}
