"""Files for whoever runs the processes of one machine: systemd units, a compose file, a container image recipe.

Each process gets a user of its own, and a folder of its own with copies of the few files that it needs. The copies are
made by one short shell script, which says in one line each who gets what, and which root starts: it reads every file as
the user who owns it and writes it as the user who gets it, so that neither can point it at a file of root's.

No file that is written here holds a secret; who reads them learns names of users and folders.
"""

from __future__ import annotations

import dataclasses
import json
import pwd
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from privacy.errors import PlanError
from privacy.files import write_whole

_HARDENED: Final = """\
NoNewPrivileges=yes
CapabilityBoundingSet={capabilities}
AmbientCapabilities={capabilities}
ProtectSystem=strict
ProtectHome={protect_home}
PrivateTmp=yes
ProtectProc=invisible
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077
LimitCORE=0
"""
# What the processes get of the environment: Flower tells its maker about every start otherwise.
_QUIET: Final = ("FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1", "PYTHONUNBUFFERED=1", "OMP_NUM_THREADS=1")

_HANDOUT: Final = """\
#!/bin/sh
# Gives every process copies of the files that it needs, each in a folder that only its user can enter.
# Run as root. It reads as the owner of the home and writes as who gets the file; root's own files are out of reach.
# A sealed file is opened as the owner, in memory, and handed out in clear: those folders should be in memory too.
# With --follow it goes on and hands out what has changed, once a second.
set -eu
umask 077
home={home}
owner="${{TACIT_OWNER:-{owner}}}"
tacit="${{TACIT_PROGRAM:-{program}}}"

# What opens sealed files is in the environment, and for the owner alone.
as() {{
    (
        unset TACIT_VAULT_KEYS TACIT_VAULT_PASSPHRASE TACIT_VAULT_PASSPHRASE_FILE
        switch "$@"
    )
}}

switch() {{
    user="$1"
    shift
    setpriv --reuid "$user" --regid "$(id -g "$user" 2>/dev/null || echo "$user")" --clear-groups --no-new-privs "$@"
}}

# sealed FILE: whether it is; content FILE: what it says.
sealed() {{
    as "$owner" head -c 8 "$home/$1" | grep -qa TACIT
}}

content() {{
    if sealed "$1"; then switch "$owner" "$tacit" vault open "$home/$1"; else as "$owner" cat "$home/$1"; fi
}}

# give USER FOLDER FILE: a copy of the home's FILE, for USER alone, under the same name in FOLDER.
# Nothing that USER does to its folder keeps the others from getting theirs.
give() {{
    if ! as "$owner" test -s "$home/$3"; then
        echo "expected a file at $home/$3, got none; is it prepared?" >&2
        failed=1
        return 0
    fi
    # To open one takes a start of Python: again, only where it has changed.
    if [ -n "$again" ] && [ "$2/$3" -nt "$home/$3" ] && sealed "$3"; then return 0; fi
    install -d -m 0700 -o "$1" -g "$(id -g "$1" 2>/dev/null || echo "$1")" "$2" || failed=1
    content "$3" | as "$1" timeout 60 sh -c '
        set -e
        mkdir -p "$(dirname "$1")"
        rm -f "$1.new"
        cat > "$1.new"
        if [ ! -s "$1.new" ] || cmp -s "$1.new" "$1"; then rm -f "$1.new"; else mv -f "$1.new" "$1"; fi
    ' give "$2/$3" || {{ echo "expected to hand $3 to $1, got a failure; look into $2" >&2; failed=1; }}
}}

all() {{
    failed=0
{lines}
    return $failed
}}

again=
all
again=yes
while [ "${{1:-}}" = --follow ]; do
    sleep 1
    # A file that is being renewed is there a moment later.
    all || true
done
"""

CONTAINERFILE: Final = """\
# The image of every process; which one it is, its command says. Build it in a checkout of Tacit:
#   docker build -f {folder}/Containerfile -t tacit:{version} .
FROM python:3.11-slim
RUN groupadd --gid {post} tacit-post \\
 && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin tacit
WORKDIR /opt/tacit
COPY pyproject.toml constraints.txt README.md tacit.py ./
COPY privacy ./privacy
COPY models ./models
COPY clients ./clients
COPY server ./server
COPY simulations ./simulations
# The versions that Tacit was tested with, and no others.
RUN pip install --no-cache-dir --constraint constraints.txt .
WORKDIR /
ENV FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
# Never root: a command that needs another user says so in the compose file.
USER 10001:10001
ENTRYPOINT []
CMD ["tacit", "--help"]
"""
# The group whose members may call at a worker's socket; in containers by its number.
POST: Final = "tacit-post"
POST_NUMBER: Final = 10010


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gift:
    """One file that a process gets a copy of.

    Attributes:
        user: Who gets it.
        variable: Environment variable that names another user instead, in a container.
        folder: That user's folder.
        file: Name in the home, and there.
        later: Whether it may be missing at first.
    """

    user: str
    variable: str
    folder: str
    file: str
    later: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """One process as a systemd service.

    Attributes:
        name: Of the unit, without its suffix.
        text: What it is.
        command: Program and arguments.
        user: Who runs it.
        after: Units that come first, and that are stopped later.
        networks: Address families that it may use.
        local: Whether it may reach this machine alone.
        writes: Folders that it may write to.
        hidden: What it must not even see.
        executable_memory: Whether it may make memory executable; PyTorch's kernels are made as they run.
        devices: Whether it may use devices, as a GPU.
        grace_s: Seconds that it gets to end by itself.
        more: Further lines of the section Service.
    """

    name: str
    text: str
    command: Sequence[str]
    user: str
    after: Sequence[str] = ()
    networks: Sequence[str] = ("AF_UNIX", "AF_INET", "AF_INET6")
    local: bool = False
    writes: Sequence[str] = ()
    hidden: Sequence[str] = ()
    executable_memory: bool = False
    devices: bool = False
    grace_s: int = 30
    more: Sequence[str] = ()

    def unit(self, target: str, *, homes: bool, capabilities: str = "", once: bool = False) -> str:
        """Returns the unit's text.

        Args:
            target: The target that it is a part of.
            homes: Whether something that it needs lies under /home or /root.
            capabilities: What root's power it keeps; nothing by default.
            once: Whether it does one thing and is over.
        """
        kind = ["Type=oneshot"] if once else ["Type=exec", "Restart=always", "RestartSec=2"]
        lines = [
            "[Unit]",
            f"Description=Tacit: {self.text}",
            *([f"Requires={' '.join(self.after)}", f"After={' '.join(self.after)}"] if self.after else []),
            f"PartOf={target}",
            "",
            "[Service]",
            *kind,
            f"ExecStart={quoted(self.command)}",
            f"User={self.user}",
            *(f"Environment={one}" for one in _QUIET),
            *self.more,
            f"TimeoutStopSec={self.grace_s}",
            _HARDENED.format(capabilities=capabilities, protect_home="read-only" if homes else "yes").rstrip(),
            f"RestrictAddressFamilies={' '.join(self.networks)}",
            *(["IPAddressDeny=any", "IPAddressAllow=localhost"] if self.local else []),
            *([] if self.devices else ["PrivateDevices=yes"]),
            *(
                ["# PyTorch makes code as it runs: with MemoryDenyWriteExecute a convolution fails."]
                if self.executable_memory
                else ["MemoryDenyWriteExecute=yes"]
            ),
            *(f"ReadWritePaths={path}" for path in self.writes),
            *(f"InaccessiblePaths=-{path}" for path in self.hidden),
            "",
            "[Install]",
            f"WantedBy={target}",
        ]
        return "\n".join(lines) + "\n"


def quoted(command: Sequence[str]) -> str:
    """Returns a command as systemd reads it."""
    return " ".join(shlex.quote(one.replace("%", "%%").replace("$", "$$")) for one in command)


def handout(home: Path, owner: str, gifts: Sequence[Gift], more: Sequence[str] = (), *, program: str) -> str:
    """Returns the script that hands out copies, opened by ``program``; ``more`` are further lines of shell."""
    lines = []
    for gift in gifts:
        line = f'give "${{{gift.variable}:-{gift.user}}}" {shlex.quote(gift.folder)} {shlex.quote(gift.file)}'
        there = f'if as "$owner" test -e "$home"/{shlex.quote(gift.file)}; then {line}; fi'
        lines.append(there if gift.later else line)
    text = "\n".join(f"    {line}" for line in (*lines, *more))
    return _HANDOUT.format(home=shlex.quote(str(home)), owner=owner, program=program, lines=text)


def target(text: str, units: Sequence[str]) -> str:
    """Returns the target that starts and stops all units."""
    return (
        f"[Unit]\nDescription=Tacit: {text}\nAfter=network-online.target\nWants=network-online.target {' '.join(units)}"
        "\n\n[Install]\nWantedBy=multi-user.target\n"
    )


def handout_units(
    name: str,
    script: str,
    *,
    prepared: str,
    watched: Sequence[Path],
    homes: bool,
    writes: Sequence[str] = (),
    more: Sequence[str] = (),
) -> dict[str, str]:
    """Returns the units that run the script at the start, and whenever a file has changed; ``more`` as in `Service`."""
    part_of = f"{name}.target"
    service = Service(
        name=f"{name}-handout",
        text="hands each process copies of the files that it needs",
        command=["/bin/sh", script],
        user="root",
        after=[prepared],
        networks=["AF_UNIX"],
        writes=["/run", "/var/lib", *writes],
        more=["PrivateNetwork=yes", *more],
    )
    path = [
        "[Unit]",
        "Description=Tacit: sees files that are to be handed out again",
        f"PartOf={part_of}",
        "",
        "[Path]",
        *(f"PathChanged={one}" for one in watched),
        "",
        "[Install]",
        f"WantedBy={part_of}",
    ]
    capabilities = "CAP_CHOWN CAP_DAC_READ_SEARCH CAP_FOWNER CAP_SETUID CAP_SETGID"
    return {
        f"{name}-handout.service": service.unit(part_of, homes=homes, capabilities=capabilities, once=True),
        f"{name}-handout.path": "\n".join(path) + "\n",
    }


def sysusers(users: Mapping[str, str], groups: Sequence[str] = (), members: Sequence[tuple[str, str]] = ()) -> str:
    """Returns users and groups to make, for ``systemd-sysusers``."""
    lines = [f"g {name} -" for name in groups]
    lines += [f'u {name} - "{text}"' for name, text in users.items()]
    lines += [f"m {user} {group}" for user, group in members]
    return "\n".join(lines) + "\n"


def compose(
    services: Mapping[str, Mapping[str, object]], volumes: Sequence[str], comment: str, *, memory: Sequence[str] = ()
) -> str:
    """Returns a compose file; values are written as JSON, which YAML reads too; ``memory`` are volumes in memory."""
    lines = [f"# {line}" for line in comment.splitlines()] + ["services:"]
    for name, fields in services.items():
        lines.append(f"  {name}:")
        lines += [f"    {key}: {json.dumps(value)}" for key, value in fields.items()]
    lines += ["volumes:", *(f"  {name}: {{}}" for name in volumes)]
    # Keys are in clear there: on no disk.
    options = json.dumps({"driver_opts": {"type": "tmpfs", "device": "tmpfs", "o": "mode=0755"}})
    lines += [f"  {name}: {options}" for name in memory]
    return "\n".join(lines) + "\n"


def container(command: Sequence[str], *, user: str, image: str, **more: object) -> dict[str, object]:
    """Returns a container that can do nothing but its command, as one user, on a file system that it cannot change."""
    base: dict[str, object] = {
        "image": image,
        "command": list(command),
        "user": user,
        "read_only": True,
        "tmpfs": ["/tmp"],  # noqa: S108 -- the container's own
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
        "init": True,
    }
    return base | more


def owner_of(folder: Path, named: str | None) -> str:
    """Returns the user who owns a home, under whom its processes with secrets run.

    Raises:
        PlanError: Root owns it, or nobody known.
    """
    if named:
        return named
    number = folder.stat().st_uid
    try:
        name = pwd.getpwuid(number).pw_name
    except KeyError:
        name = ""
    if not number or not name:
        raise PlanError(
            f"expected {folder} to belong to a user of its own, got {name or number}; make one and give it the folder "
            "(useradd --system tacit; chown -R tacit FOLDER), or name it with --user"
        )
    return name


def under_homes(paths: Sequence[str]) -> bool:
    """Says whether one of the paths lies where users' homes are."""
    return any(path.startswith(("/home/", "/root/", "/run/user/")) for path in paths)


def write_files(folder: Path, files: Mapping[str, str], *, force: bool) -> list[Path]:
    """Writes files into a folder; all of them, or none where one is there already.

    Args:
        folder: Made where it is missing.
        files: Text by name.
        force: Whether files that are there may be replaced.

    Raises:
        PlanError: One is there already.
        RunError: The folder cannot be written.
    """
    there = sorted(name for name in files if (folder / name).exists())
    if there and not force:
        raise PlanError(
            f"expected no {there[0]} in {folder} yet, got one; choose another folder, or replace it with --force"
        )
    for name, text in files.items():
        write_whole(folder / name, text.encode())
        # No secret is in them, and systemd reads them as root; people may read them too.
        (folder / name).chmod(0o644)
    return [folder / name for name in files]
