"""The house: who may import whom, what is installed, and what must stay outside."""

import ast
import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ROOMS = ("server", "clients", "privacy", "models", "simulations")
MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "simulations": ("server", "clients", "privacy", "models"),
    "server": ("privacy", "models"),
    "clients": ("privacy", "models"),
    "privacy": (),
    "models": (),
}
HOMES: Mapping[str, tuple[str, ...]] = {
    "opacus": ("privacy/dpsgd", "privacy/accounting"),
    "tenseal": ("privacy/he",),
    "cryptography": ("privacy/noise", "privacy/seal", "privacy/vault", "privacy/identity"),
    "flwr": ("server", "clients", "simulations"),
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imports(path: Path) -> Iterator[str]:
    """Yields every module that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(word.value) for word in node.args if isinstance(word, ast.Constant))


def faults(root: Path) -> list[str]:
    """Lists every import that breaks the rules of the house, as 'file imports module'."""
    found = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            place = path.relative_to(root).with_suffix("").as_posix()
            for module in imports(path):
                top = module.partition(".")[0]
                forbidden = top in (*ROOMS, "tacit", "tests", "bench") and top not in (
                    room,
                    *MAY_IMPORT[room],
                )
                homes = HOMES.get(top, (place,))
                homeless = not any(place == home or place.startswith(f"{home}/") for home in homes)
                if forbidden or homeless:
                    found.append(f"{place} imports {module}")
    return found


def test_the_rooms_import_only_downwards_and_libraries_stay_in_their_homes() -> None:
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("server/app.py", "import clients.app"),
        ("clients/app.py", "def late():\n    from server.app import x"),
        ("models/task.py", "from privacy.errors import PlanError"),
        ("privacy/plan.py", "import models"),
        ("privacy/plan.py", "import flwr.app"),
        ("privacy/dp.py", "from opacus import GradSampleModule"),
        ("privacy/dpsgd_more.py", "import opacus"),
        ("server/app.py", "import cryptography"),
        ("server/app.py", "import importlib\nimportlib.import_module('tests.oracles')"),
        ("clients/app.py", "import tacit"),
        ("privacy/plan.py", "import tenseal"),
    ],
)
def test_an_import_in_the_wrong_direction_is_found(tmp_path: Path, place: str, text: str) -> None:
    path = tmp_path / place
    path.parent.mkdir()
    path.write_text(text)
    assert len(faults(tmp_path)) == 1


def test_the_command_imports_its_libraries_only_where_it_uses_them() -> None:
    tree = ast.parse((ROOT / "tacit.py").read_text())
    first = {
        name.partition(".")[0]
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert first <= set(sys.stdlib_module_names)
    assert not {module.partition(".")[0] for module in imports(ROOT / "tacit.py")} & set(HOMES)


def test_import_linter_is_told_the_same_rules() -> None:
    settings = PROJECT["tool"]["importlinter"]
    assert tuple(settings["root_packages"]) == ROOMS
    contracts = settings["contracts"]
    assert contracts[0]["layers"] == ["simulations", "server | clients", "privacy | models"]
    for library, homes in HOMES.items():
        (contract,) = (c for c in contracts if c.get("forbidden_modules") == [library])
        rooms = set(contract["source_modules"])
        allowed = {
            line.partition(" ->")[0].removesuffix(".**").replace(".", "/")
            for line in contract.get("ignore_imports", [])
        }
        assert allowed | (set(ROOMS) - rooms) == set(homes)


def test_the_front_page_of_a_room_is_a_sentence_and_loads_nothing() -> None:
    for room in ROOMS:
        tree = ast.parse((ROOT / room / "__init__.py").read_text())
        assert ast.get_docstring(tree)
        assert len(tree.body) == 1


def test_no_test_folder_is_a_package_and_no_two_test_files_share_a_name() -> None:
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "apps" not in path.parts]
    assert not [path for path in tests if path.name == "__init__.py"]
    names = [path.name for path in tests]
    assert len(names) == len(set(names))


# What is installed.


def claimants(names: tuple[str, ...], distributions: list[importlib.metadata.Distribution]) -> set[tuple[str, str]]:
    """Finds the (name, owner) pairs where a distribution other than Tacit installs a top-level name."""
    found = set()
    for distribution in distributions:
        owner = str(distribution.metadata["Name"])
        if owner.lower() == "tacit":
            continue
        for file in distribution.files or ():
            top = file.parts[0].removesuffix(".py")
            if top in names and file.suffix == ".py" and (len(file.parts) > 1 or file.name == f"{top}.py"):
                found.add((top, owner))
    return found


def test_no_other_distribution_installs_one_of_our_names() -> None:
    assert claimants((*ROOMS, "tacit"), list(importlib.metadata.distributions())) == set()


def test_a_distribution_that_installs_one_of_our_names_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "RECORD").write_text(
        "server/__init__.py,,\nother.py,,\nexamples/clients/x.py,,\nother-1.0.dist-info/RECORD,,\n"
    )
    other = importlib.metadata.PathDistribution(folder)
    assert claimants((*ROOMS, "tacit"), [other]) == {("server", "other")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_wheel_and_the_flower_bundle_hold_the_five_rooms_and_the_command_only(tmp_path: Path) -> None:
    """G11: what injects test noise lives under tests/, which is in neither."""
    checkout = tmp_path / "tacit"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        ".",
        ".",
    ]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (wheel,) = checkout.glob("tacit-*.whl")
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", "build"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (bundle,) = checkout.glob("*.fab")
    code = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")} | {"tacit.py"}
    for archive, extra in (
        (wheel, r"tacit-[^/]+\.dist-info/"),
        (bundle, r"pyproject\.toml|README\.md|\.info/"),
    ):
        names = set(zipfile.ZipFile(archive).namelist())
        assert {name for name in names if not re.match(extra, name)} == code
    assert bundle.stat().st_size < 10 * 2**20


def test_the_package_cannot_be_uploaded_by_accident_and_has_one_command() -> None:
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]
    assert PROJECT["project"]["scripts"] == {"tacit": "tacit:main"}
    assert PROJECT["project"]["requires-python"] == ">=3.11"


def test_every_dependency_is_pinned_to_a_version_it_allows_and_no_pin_names_a_place() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line).groups()  # type: ignore[union-attr]
            pins[name] = version
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        assert pins[requirement.name.lower()] in requirement.specifier
    assert len(pins) < 140  # Only what the tree needs, never a whole machine.


def test_everything_imported_from_outside_is_declared_as_a_dependency() -> None:
    declared = {Requirement(line).name.lower() for line in PROJECT["project"]["dependencies"]} | {"ray"}
    names = {
        "sklearn": "scikit-learn",
        "dp_accounting": "dp-accounting",
        "PIL": "pillow",
        "google": "protobuf",
    }
    # Each of these comes with, and is pinned by, a dependency that could not work without it.
    carried = {"pillow", "protobuf", "scipy"}
    used = {
        module.partition(".")[0]
        for room in (*(ROOT / room for room in ROOMS), ROOT)
        for path in (room.rglob("*.py") if room != ROOT else [ROOT / "tacit.py"])
        for module in imports(path)
    }
    outside = used - set(sys.stdlib_module_names) - {*ROOMS, "tacit", "__future__"}
    assert {names.get(module, module) for module in outside} <= declared | carried


# What we leave alone on purpose; docs/pitfalls.md has the reasons.

FROM_OPACUS = {"compute_rdp", "PRVAccountant", "GradSampleModule"}
UNSAFE = {
    "torch.load": "runs code from a file",
    "pickle.load": "runs code from a file",
    "pickle.loads": "runs code from a file",
    "torch.normal": "noise from a generator that is not secret",
    "torch.randn": "noise from a generator that is not secret",
    "torch.randn_like": "noise from a generator that is not secret",
    "np.random.normal": "noise from a generator that is not secret",
}


def unsafe(path: Path) -> set[str]:
    """Finds what a file takes from Opacus beyond the three parts that hold, and calls that have no place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "opacus":
            found |= {alias.name for alias in node.names} - FROM_OPACUS
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "opacus"}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE:
            found.add(ast.unparse(node.func))
    return found


def test_of_opacus_only_the_parts_that_hold_are_used_and_nothing_unsafe_is_called() -> None:
    """T1, T5, T6, T11, T13, T18-T23: no engine, loader, sampler, checkpoint or GDP accountant of Opacus."""
    rooms = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert {path.name: found for path in rooms if (found := unsafe(path))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "from opacus import PrivacyEngine",
        "from opacus.accountants import GaussianAccountant",
        "from opacus.utils.batch_memory_manager import BatchMemoryManager",
        "import opacus",
        "import torch\ndef f(x):\n    return torch.load(x, weights_only=False)",
        "noise = torch.normal(0, 1, (3,))",
    ],
)
def test_an_unsafe_part_is_found(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(text)
    assert len(unsafe(path)) == 1


# What is written down is there.


def dangling(page: Path, root: Path) -> set[str]:
    """Finds links to files that are not there, and names of tests that nobody has written."""
    text = page.read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")}
    lost = {link for link in links if not (page.parent / link).exists()}
    return lost | (set(re.findall(r"`(test_\w+)`", text)) - written(root))


@functools.cache
def written(root: Path) -> set[str]:
    """Returns the names of all tests, read once for all pages."""
    return {
        node.name
        for path in (root / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_link_and_every_test_that_a_page_names_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    assert {page.name: lost for page in pages if (lost := dangling(page, ROOT))} == {}


def test_a_lost_link_and_a_guard_that_nobody_wrote_are_found(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_that_is_there() -> None: ...\n")
    page = tmp_path / "page.md"
    page.write_text("[a](absent.md) [b](page.md) `test_that_is_there` `test_that_is_not`")
    assert dangling(page, tmp_path) == {"absent.md", "test_that_is_not"}
