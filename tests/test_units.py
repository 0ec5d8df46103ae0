"""Systemd units, compose file and image recipe: they parse, say our own commands, part users, and hold no secret."""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

import tacit
from clients.home import ClientHome, Policy, Settings
from clients.units import GIFTS as TO_CLIENTS
from privacy.enrolment import Address
from privacy.errors import PlanError
from privacy.identity.loopback import write_loopback
from privacy.unit_files import owner_of, quoted, write_files
from privacy.vault import private
from privacy.vault.container import is_sealed
from server.services import BELL
from server.units import GIFTS as TO_SERVERS
from tests.enrolling import make_home

PROGRAM = "/opt/tacit/bin/tacit"
SIDES = ("server", "client")
ROOT = Path(__file__).parents[1]


def client_home(folder: Path) -> ClientHome:
    """A home as joining leaves it."""
    home = ClientHome(folder)
    home.make()
    home.make_keys()
    home.save(
        Settings(
            name="north",
            federation="demo",
            addresses=(Address("localhost", 1),),
            enrol=(Address("localhost", 2),),
            server="0" * 64,
            authority="0" * 64,
            task="table",
            data="/srv/records",
            data_set="data",
            ledger=str(folder / "ledger"),
            policy=Policy(epsilon=1.0, delta=1e-5, records_bound=100),
        )
    )
    return home


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of both sides."""
    folder = tmp_path_factory.mktemp("made")
    make_home(folder / "s")
    client_home(folder / "c")
    for side in SIDES:
        home = str(folder / side[0])
        command = [side, "units", str(folder / side), "--home", home, "--user", "anna", "--program", PROGRAM]
        assert tacit.main([*command, "--metrics", "9464"]) == 0
    return {side: folder / side for side in SIDES}


def services(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Every service of a folder: its settings, each with all its values."""
    found = {}
    for path in sorted(folder.glob("*.service")):
        settings: dict[str, list[str]] = {}
        for line in path.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                settings.setdefault(key, []).append(value)
        found[path.stem.split("-", 2)[2]] = settings
    return found


def knows(command: list[str]) -> bool:
    """Whether the command line is one that our program has."""
    parser = tacit._Parser(prog="tacit")
    kinds = parser.add_subparsers(dest="verb", parser_class=tacit._Parser)
    tacit._client_page(kinds)
    tacit._server_page(kinds)
    try:
        _, unknown = parser.parse_known_args(command)
    except (PlanError, SystemExit, argparse.ArgumentError):
        return False
    return not unknown


@pytest.mark.parametrize("side", SIDES)
def test_units_parse_and_every_command_is_one_of_ours(made: dict[str, Path], side: str) -> None:
    for path in made[side].glob("*.*"):
        if path.suffix in (".service", ".path", ".timer", ".target"):
            parser = configparser.ConfigParser(strict=False, interpolation=None)
            parser.optionxform = str  # type: ignore[assignment]
            parser.read(path)
            assert parser.has_section("Unit"), path
    for name, unit in services(made[side]).items():
        (command,) = unit["ExecStart"]
        words = shlex.split(command)
        if name == "handout":
            assert words == ["/bin/sh", str(made[side] / f"tacit-{side}-handout.sh")]
            assert Path(words[1]).exists()
            continue
        assert words[0] == PROGRAM
        assert knows(words[1:]), command
    assert not knows([side, "nothing"])
    assert not knows([side, "status", "--nothing"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("side", SIDES)
def test_systemd_understands_the_units(made: dict[str, Path], side: str, tmp_path: Path) -> None:
    units = [path for path in made[side].glob("*.*") if path.suffix in (".service", ".path", ".timer", ".target")]
    for path in units:
        # The program is not on this machine; any that is will do.
        (tmp_path / path.name).write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    names = sorted(str(tmp_path / path.name) for path in units)
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *names]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert [line for line in done.stderr.splitlines() if str(tmp_path) in line] == []
    planted = Path(next(name for name in names if name.endswith(".service")))
    planted.write_text(planted.read_text().replace("ProtectSystem=", "ProtektSystem="))
    done = subprocess.run([*verify[:4], str(planted)], capture_output=True, text=True, timeout=60, check=False)
    assert "ProtektSystem" in done.stderr


@pytest.mark.parametrize("side", SIDES)
def test_every_process_is_hardened(made: dict[str, Path], side: str) -> None:
    for name, unit in services(made[side]).items():
        for setting, value in (
            *(("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"), ("PrivateTmp", "yes")),
            *(("RestrictNamespaces", "yes"), ("PrivateDevices", "yes")),
        ):
            assert unit[setting] == [value], (name, setting)
        assert unit["RestrictAddressFamilies"], name
        assert (unit.get("MemoryDenyWriteExecute") == ["yes"]) == (name != "worker"), name
        assert (unit["CapabilityBoundingSet"] == [""]) == (name != "handout"), name
        assert (unit["User"] == ["root"]) == (name == "handout"), name


def test_g15_the_couriers_user_gets_no_file_of_the_workers_and_the_worker_has_no_network(made: dict[str, Path]) -> None:
    units = services(made["client"])
    assert units["worker"]["User"] == ["anna"]
    assert units["worker"]["PrivateNetwork"] == ["yes"]
    assert units["worker"]["RestrictAddressFamilies"] == ["AF_UNIX"]
    home = str(made["client"].parent / "c")
    for name in ("courier", "supernode"):
        assert units[name]["User"] == ["tacit-flower"]
        assert set(units[name]["InaccessiblePaths"]) == {f"-{home}", "-/srv/records"}
        assert units[name]["IPAddressDeny"] == ["any"]
    assert units["tunnel"]["User"] == ["tacit-tunnel"]
    # Who may call at the socket: the courier's user, by its group.
    assert units["worker"]["SupplementaryGroups"] == units["courier"]["SupplementaryGroups"] == ["tacit-post"]
    assert "SupplementaryGroups" not in units["tunnel"]
    given = {gift.user: {one.file for one in TO_CLIENTS if one.user == gift.user} for gift in TO_CLIENTS}
    for files in given.values():
        assert not files & {"keys/application.key", "policy.json"}
        assert not any(file.startswith(("ledger", "kept", "log", "jobs")) for file in files)
    assert "keys/tls.pem" not in given["tacit-flower"]


def test_g21_relay_and_gateway_get_no_key_of_server_or_authority(made: dict[str, Path]) -> None:
    units = services(made["server"])
    assert {units[name]["User"][0] for name in ("relay", "gateway", "enrolment")} == {
        "tacit-relay",
        "tacit-gateway",
        "anna",
    }
    assert not any(gift.file.startswith(("application", "authority", "enrol")) for gift in TO_SERVERS)
    assert units["enrolment"]["InaccessiblePaths"] == [f"-{made['server'].parent / 's'}/application"]


def test_g21_the_gateway_hears_a_bell_that_the_owner_may_ring_and_nobody_else(made: dict[str, Path]) -> None:
    (command,) = services(made["server"])["gateway"]["ExecStart"]
    words = shlex.split(command)
    assert (words[words.index("--bell") + 1], words[words.index("--bell-group") + 1]) == (str(BELL), "tacit-bell")
    gateway = services(made["server"])["gateway"]
    assert (gateway["RuntimeDirectory"], gateway["SupplementaryGroups"]) == ([BELL.parent.name], ["tacit-bell"])
    users = (made["server"] / "tacit-server.sysusers").read_text().splitlines()
    assert {"g tacit-bell -", "m anna tacit-bell"} <= set(users)
    assert [line for line in users if line.startswith("m ")] == ["m anna tacit-bell"]
    told = yaml.safe_load((made["server"] / "compose.yaml").read_text())["services"]
    ringing = {name for name, service in told.items() if service.get("group_add")}
    assert ringing == {"gateway", "application"}
    assert all(f"bell:{BELL.parent}" in told[name]["volumes"] for name in ringing)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
def test_g21_a_bell_of_another_user_rings_for_its_group_and_for_nobody_else(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o11)
    room = tmp_path / "tacit-gateway"
    room.mkdir(mode=0o711)
    os.chown(room, 20007, 20007)
    room.chmod(0o711)
    authority = tmp_path / "ca.pem"
    write_loopback(tmp_path, now=time.time())
    (tmp_path / "loopback-ca.pem").rename(authority)
    for path in (authority, tmp_path / "loopback.pem"):
        path.chmod(0o644)
    program = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from server.gateway import Door, Gateway\n"
        "os.setgroups([20008]); os.setgid(20007); os.setuid(20007); os.umask(0o077)\n"
        "pem, ca, bell = map(Path, sys.argv[1:])\n"
        "async def main():\n"
        "    tls = dict(certificate=pem, key=pem, authority=ca)\n"
        "    door = Door(host='127.0.0.1', port=0, **tls, wake=bell, wake_group=20008)\n"
        "    gateway = Gateway(door, lambda der: None)\n"
        "    heard = []\n"
        "    gateway.ring = lambda: (heard.append(1), print('rung', flush=True))\n"
        "    await gateway.start()\n"
        "    print('open', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    bell = room / "bell"
    where = {"cwd": str(ROOT), "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "loopback.pem"), str(authority), str(bell)],
        stdout=subprocess.PIPE,
        **where,
    ) as gateway:
        try:
            assert gateway.stdout is not None
            assert gateway.stdout.readline() == "open\n"
            assert (bell.stat().st_mode & 0o777, bell.stat().st_gid) == (0o620, 20008)

            def rings(group: int) -> bool:
                ringing = (
                    "import os, socket, sys\n"
                    f"os.setgroups([{group}]); os.setgid(20009); os.setuid(20009)\n"
                    "with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell: bell.sendto(b'!', sys.argv[1])\n"
                )
                command = [sys.executable, "-c", ringing, str(bell)]
                return subprocess.run(command, capture_output=True, check=False, **where).returncode == 0

            assert not rings(20009)
            assert rings(20008)
            assert gateway.stdout.readline() == "rung\n"
        finally:
            gateway.kill()


def test_metrics_of_parts_that_are_started_one_by_one_have_a_unit_where_they_are_asked_for(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in SIDES:
        unit = services(made[side])["metrics"]
        (command,) = unit["ExecStart"]
        home = str(made[side].parent / side[0])
        assert shlex.split(command)[1:] == [side, "metrics", "9464", "--home", home]
        assert unit["User"] == ["anna"]
        assert "ReadWritePaths" not in unit
    hidden = {path.rpartition("/s/")[2] for path in services(made["server"])["metrics"]["InaccessiblePaths"]}
    assert hidden == {"authority", "application/server.key", "application/vault.keys"}
    assert services(made["client"])["metrics"]["InaccessiblePaths"] == ["-/srv/records"]
    assert services(made["client"])["metrics"]["IPAddressDeny"] == ["any"]
    command = ["units", str(tmp_path / "u"), "--user", "anna", "--program", PROGRAM]
    for side in SIDES:
        home = str(made[side].parent / side[0])
        assert tacit.main([side, *command, "--home", home, "--metrics", "no-port"]) == PlanError.exit_code
    # What a holder has spent is nobody's business on another machine.
    assert tacit.main(["client", *command, "--home", home, "--metrics", "0.0.0.0:9464"]) == PlanError.exit_code
    assert not (tmp_path / "u").exists()
    assert tacit.main(["server", *command, "--home", str(made["server"].parent / "s")]) == 0
    assert not (tmp_path / "u" / "tacit-server-metrics.service").exists()
    capsys.readouterr()


@pytest.mark.parametrize("side", SIDES)
def test_metrics_are_served_alone_until_it_is_told_to_stop(made: dict[str, Path], side: str) -> None:
    home = str(made[side].parent / side[0])
    command = [sys.executable, "-m", "tacit", side, "metrics", "0", "--home", home, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            port = json.loads(process.stdout.readline())["port"]
            if side == "server":
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                    text = answer.read().decode()
                assert "tacit_members{" in text
                assert "tacit_job_running 0" in text
            else:
                # It has no ledger yet: unknown is not shown as small.
                with pytest.raises(urllib.error.HTTPError, match="503"):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20)
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_the_workers_unit_and_container_get_what_says_which_gpu_they_take(made: dict[str, Path]) -> None:
    assert services(made["client"])["worker"]["EnvironmentFile"] == ["-/etc/tacit/client.env"]
    told = yaml.safe_load((made["client"] / "compose.yaml").read_text())["services"]
    # Names alone: an empty value would hide every GPU.
    assert "CUDA_VISIBLE_DEVICES" in told["worker"]["environment"]
    assert all("environment" not in told[name] for name in ("tunnel", "supernode", "courier"))


@pytest.mark.parametrize("side", SIDES)
def test_the_compose_file_parses_and_containers_are_not_root(made: dict[str, Path], side: str) -> None:
    told: dict[str, Any] = yaml.safe_load((made[side] / "compose.yaml").read_text())
    for name, service in told["services"].items():
        handing = name.startswith("handout")
        assert service["user"].startswith("0:") == handing, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        command = service["command"]
        if command[0] == "tacit":
            assert knows(command[1:]), command
        else:
            assert command[0] == "sh"
        for other in service.get("depends_on", {}):
            assert other in told["services"]
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source.startswith(("/", ".")) or source in told["volumes"], volume
    users = {name: service["user"] for name, service in told["services"].items()}
    if side == "client":
        assert users["courier"] == users["supernode"] != users["worker"]
        assert told["services"]["worker"]["network_mode"] == "none"
        home = str(made[side].parent / "c")
        for name in ("courier", "supernode", "tunnel"):
            assert not any(home in volume or "/srv" in volume for volume in told["services"][name]["volumes"]), name


def test_the_image_is_pinned_and_runs_as_nobody_special(made: dict[str, Path]) -> None:
    for side in SIDES:
        text = (made[side] / "Containerfile").read_text()
        assert text.splitlines()[2] == "FROM python:3.11-slim"
        assert re.search(r"pip install .*--constraint constraints\.txt", text)
        last = [line for line in text.splitlines() if line.startswith("USER")][-1]
        assert last == "USER 10001:10001"
        root = Path(tacit.__file__).parent
        for line in text.splitlines():
            if line.startswith("COPY"):
                assert all((root / word).exists() for word in line.split()[1:-1])


@pytest.mark.parametrize("side", SIDES)
def test_no_file_holds_a_secret(made: dict[str, Path], side: str) -> None:
    home = made[side].parent / side[0]
    keys = [path for path in home.rglob("*") if path.is_file() and (path.suffix in (".key", ".pem", ".secret"))]
    assert keys
    for path in made[side].iterdir():
        text = path.read_bytes()
        assert b"PRIVATE KEY" not in text
        for key in keys:
            content = private.read(key)
            for form in (content[:32], content[:16].hex().encode()):
                assert form not in text or content.startswith(b"-----BEGIN CERT"), (path, key)
        assert path.stat().st_mode & 0o777 == 0o644


def test_files_that_are_there_are_kept_unless_forced(made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = made["server"]
    unit = folder / "tacit-server-relay.service"
    before = unit.read_text()
    unit.write_text("mine")
    command = ["server", "units", str(folder), "--home", str(folder.parent / "s"), "--user", "anna"]
    command += ["--program", PROGRAM]
    assert tacit.main(command) == PlanError.exit_code
    assert unit.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert tacit.main([*command, "--force", "--json"]) == 0
    assert unit.read_text() == before
    assert str(unit) in json.loads(capsys.readouterr().out)["files"]
    with pytest.raises(PlanError, match=r"expected no b in .* yet"):
        write_files(folder, {"a": "", "b": ""} | {"b": ""} if (folder / "b").write_text("") == 0 else {}, force=False)
    assert not (folder / "a").exists()
    (folder / "b").unlink()


def test_a_home_of_roots_is_refused_and_commands_are_quoted(tmp_path: Path) -> None:
    assert owner_of(tmp_path, "anna") == "anna"
    if os.getuid() == 0:
        with pytest.raises(PlanError, match="useradd"):
            owner_of(tmp_path, None)
    assert shlex.split(quoted(["a b", "c"])) == ["a b", "c"]
    assert quoted(["100%", "$HOME"]) == "100%% '$$HOME'"


# -- who gets what -----------------------------------------------------------------------------------------------------


def handed(made: dict[str, Path], side: str, tmp_path: Path, users: dict[str, str]) -> Path:
    """Runs the script with other folders and users; returns where the folders are."""
    text = (made[side] / f"tacit-{side}-handout.sh").read_text()
    for place in ("/var/lib/tacit-", "/run/tacit-"):
        text = text.replace(place, f"{tmp_path}/tacit-")
    (tmp_path / "handout.sh").write_text(text)
    program = tmp_path / "tacit"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tacit "$@"\n')
    program.chmod(0o755)
    users = users | {"TACIT_PROGRAM": str(program), "TACIT_VAULT_PASSPHRASE": "only for the owner"}
    subprocess.run(
        ["sh", str(tmp_path / "handout.sh")], check=True, timeout=60, env=dict(os.environ) | users, capture_output=True
    )
    return tmp_path


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_g15_what_is_handed_out_is_what_is_listed_each_to_one_user(made: dict[str, Path], tmp_path: Path) -> None:
    home = made["client"].parent / "c"
    (home / "run").mkdir(exist_ok=True)
    for gift in TO_CLIENTS:
        if not (home / gift.file).exists():
            (home / gift.file).write_text(gift.file)
    users = {"TACIT_OWNER": "0", "TACIT_TUNNEL_USER": "20005", "TACIT_FLOWER_USER": "20006"}
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        if not parent.stat().st_mode & 0o1:
            # Others must be able to reach a folder that is theirs.
            parent.chmod(0o711)
    place = handed(made, "client", tmp_path, users)
    for folder, user in (("tacit-tunnel", 20005), ("tacit-flower", 20006)):
        files = {str(path.relative_to(place / folder)) for path in (place / folder).rglob("*") if path.is_file()}
        assert files == {gift.file for gift in TO_CLIENTS if gift.folder.endswith(folder)}
        for path in (place / folder, *(place / folder).rglob("*")):
            assert path.stat().st_uid == user
            assert not path.stat().st_mode & 0o077
    # What is sealed in the home is in clear there, for whoever cannot open it.
    assert is_sealed(home / "keys" / "supernode.key")
    given = place / "tacit-flower" / "keys" / "supernode.key"
    assert given.read_bytes() == private.read(home / "keys" / "supernode.key")
    # A renewed file is handed out again; links that a process planted lead nowhere, and keep nothing from the others.
    aim, ports = tmp_path / "aim", place / "tacit-flower" / "run" / "ports"
    aim.write_text("root's")
    aim.chmod(0o600)
    ports.with_name("ports.new").symlink_to(aim)
    folder = place / "tacit-flower" / "keys"
    folder.rename(folder.with_name("away"))
    folder.symlink_to(tmp_path)
    (home / "run" / "ports").write_text("3 4")
    with pytest.raises(subprocess.CalledProcessError):
        handed(made, "client", tmp_path, users)
    assert aim.read_text() == "root's"
    assert not (tmp_path / "supernode.key").exists()
    assert ports.read_text() == (place / "tacit-tunnel" / "run" / "ports").read_text() == "3 4"
