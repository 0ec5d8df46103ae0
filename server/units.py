"""Systemd units and a compose file for the processes of a server's machine.

    prepare      once per start, as the owner of the home: ports, certificates
    handout      root, a shell script: gives relay and gateway copies of the few files that they need
    relay        Flower's SuperLink; a user of its own, reaches this machine alone
    gateway      a user of its own; has its certificate and the list of members, and no key of server or authority;
                 its bell, which says that there are messages, is for the group tacit-bell, where the owner is
    enrolment    as the owner, who holds the authority; cannot see the server application's key

    metrics      where they are asked for: as the owner, who is kept from the keys; figures for Prometheus

The server application runs as the owner, by hand: ``tacit server run``.
"""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Final

from privacy.exposition import place
from privacy.unit_files import (
    CONTAINERFILE,
    POST_NUMBER,
    Gift,
    Service,
    compose,
    container,
    handout,
    handout_units,
    sysusers,
    target,
    under_homes,
)
from server.home import ServerHome
from server.services import BELL

_NAME: Final = "tacit-server"
RELAY, GATEWAY = "tacit-relay", "tacit-gateway"
# Who is in this group can tell the gateway that there are messages, and nothing else (guarantee G21).
_BELL_GROUP: Final = "tacit-bell"
_BELL_NUMBER: Final = 10011
# Users in containers, where names mean nothing.
# The relay's folder belongs to the relay's user, which tells reports that relay and server are two (guarantee G21); the
# owner's group goes on writing there. A link in its place is left alone.
_PARTED: Final = [
    'if as "$owner" chmod 0770 "$home/relay" 2>/dev/null; then '
    f'chown -h "${{TACIT_RELAY_USER:-{RELAY}}}" "$home/relay"; fi'
]
_NUMBERS: Final = {RELAY: 10002, GATEWAY: 10003}
GIFTS: Final = [
    *(
        Gift(
            user=GATEWAY,
            variable="TACIT_GATEWAY_USER",
            folder="/run/tacit-gateway",
            file=file,
            # There is no list before the first invitation.
            later=file == "members.json",
        )
        for file in (
            *("server.json", "members.json", "relay/tls.pem", "relay/ca.pem"),
            *("relay/port", "relay/loopback-ca.pem"),
        )
    ),
    *(
        Gift(user=RELAY, variable="TACIT_RELAY_USER", folder="/var/lib/tacit-relay", file=file)
        for file in (
            *("server.json", "relay/port", "relay/runtime.secret"),
            *("relay/loopback.pem", "relay/loopback-ca.pem"),
        )
    ),
]


def files_of(
    home: ServerHome, *, owner: str, program: str, folder: Path, version: str, metrics: str | None = None
) -> dict[str, str]:
    """Returns the files' texts by name.

    Args:
        home: The server's home.
        owner: Who owns it.
        program: Path of the ``tacit`` program.
        folder: Where the files will lie; units name the script there.
        version: Of this Tacit, for the image's tag.
        metrics: "HOST:PORT" where figures are served, or a port of loopback; None for nowhere.

    Raises:
        PlanError: There is no such place.
    """
    at, settings = str(home.folder), home.settings
    homes = under_homes([at, program, str(folder)])
    tacit = [program, "server"]
    part_of = f"{_NAME}.target"
    prepare, hand = f"{_NAME}-prepare.service", f"{_NAME}-handout.service"
    ports = settings.addresses[0].port, settings.enrol[0].port
    # The passphrases of the authority and of the keyrings, where they have one, stand in a file that only root reads.
    passphrase = "EnvironmentFile=-/etc/tacit/server.env"  # noqa: S105 -- names a file
    prepared = Service(
        name="prepare",
        text="ports and certificates of the server",
        command=[*tacit, "prepare", "--home", at],
        user=owner,
        writes=[at],
        more=["RemainAfterExit=yes", passphrase],
    )
    relay = Service(
        name="relay",
        text="the relay, which holds sealed messages",
        command=[*tacit, "relay", "--home", "/var/lib/tacit-relay"],
        user=RELAY,
        after=[hand],
        local=True,
        writes=["/var/lib/tacit-relay"],
        hidden=[at],
    )
    gateway = Service(
        name="gateway",
        text="the gateway, the one door that clients reach",
        command=[
            *(*tacit, "gateway", "--home", "/run/tacit-gateway"),
            *("--bell", str(BELL), "--bell-group", _BELL_GROUP),
        ],
        user=GATEWAY,
        after=[hand, f"{_NAME}-relay.service"],
        writes=["/run/tacit-gateway"],
        hidden=[at],
        more=[
            f"SupplementaryGroups={_BELL_GROUP}",
            f"RuntimeDirectory={BELL.parent.name}",
            # Others may pass; the bell itself is for its group.
            "RuntimeDirectoryMode=0711",
        ],
    )
    enrolment = Service(
        name="enrolment",
        text="the endpoint where invitations are redeemed and certificates renewed",
        command=[*tacit, "enrol", "--home", at],
        user=owner,
        after=[prepare],
        writes=[at],
        hidden=[f"{at}/application"],
        more=[passphrase],
    )
    shown = Service(
        name="metrics",
        text="figures for Prometheus",
        command=[*tacit, "metrics", metrics or "", "--home", at],
        user=owner,
        after=[prepare],
        hidden=[f"{at}/authority", f"{at}/application/server.key", f"{at}/application/vault.keys"],
    )
    if metrics is not None:
        place(metrics, loopback=False)
    script = folder / f"{_NAME}-handout.sh"
    low = ["CAP_NET_BIND_SERVICE" if port < 1024 else "" for port in ports]
    units = {
        prepare: prepared.unit(part_of, homes=homes, once=True),
        **handout_units(
            _NAME,
            str(script),
            prepared=prepare,
            watched=[home.members, home.relay_tls, home.folder / "server.json"],
            homes=homes,
            writes=[at],
            more=[passphrase],
        ),
        f"{_NAME}-relay.service": relay.unit(part_of, homes=homes),
        f"{_NAME}-gateway.service": gateway.unit(part_of, homes=homes, capabilities=low[0]),
        f"{_NAME}-enrolment.service": enrolment.unit(part_of, homes=homes, capabilities=low[1]),
        **({f"{_NAME}-metrics.service": shown.unit(part_of, homes=homes)} if metrics is not None else {}),
    }
    return units | {
        part_of: target("relay, gateway and enrolment", sorted(units)),
        script.name: handout(home.folder, owner, GIFTS, _PARTED, program=program),
        f"{_NAME}.sysusers": sysusers(
            {RELAY: "Tacit: the relay", GATEWAY: "Tacit: the gateway"}, [_BELL_GROUP], [(owner, _BELL_GROUP)]
        ),
        "compose.yaml": _compose(home, owner, script.name, version),
        "Containerfile": CONTAINERFILE.format(folder=folder, version=version, post=POST_NUMBER),
    }


def _compose(home: ServerHome, owner: str, script: str, version: str) -> str:
    at, settings = str(home.folder), home.settings
    ports = settings.addresses[0].port, settings.enrol[0].port
    own = _number(owner)
    image = f"tacit:{version}"
    numbers = {
        "TACIT_OWNER": own.partition(":")[0],
        "TACIT_RELAY_USER": str(_NUMBERS[RELAY]),
        "TACIT_GATEWAY_USER": str(_NUMBERS[GATEWAY]),
        "TACIT_PROGRAM": "tacit",
    }
    opens = {"TACIT_VAULT_PASSPHRASE": "${TACIT_VAULT_PASSPHRASE:-}"}
    passphrase = {"TACIT_PASSPHRASE": "${TACIT_PASSPHRASE:-}"} | opens
    where = [f"{at}:{at}"]
    bell = f"bell:{BELL.parent}"
    each = {"relay": ["relay:/var/lib/tacit-relay"], "gateway": ["gateway:/run/tacit-gateway", bell]}
    users = {name: f"{_NUMBERS[name]}:{_NUMBERS[name]}" for name in _NUMBERS}
    make_room = f"install -d -m 0711 -o {_NUMBERS[GATEWAY]} {BELL.parent} && exec sh /handout.sh"
    handing = container(
        ["sh", "-c", make_room],
        user="0:0",
        image=image,
        network_mode="none",
        environment=numbers | opens,
        cap_add=["CHOWN", "DAC_READ_SEARCH", "FOWNER", "SETUID", "SETGID"],
        volumes=[*where, *each["relay"], *each["gateway"], f"./{script}:/handout.sh:ro"],
    )
    done = {"condition": "service_completed_successfully"}
    services: dict[str, dict[str, object]] = {
        "prepare": container(
            ["tacit", "server", "prepare", "--home", at],
            user=own,
            image=image,
            network_mode="none",
            restart="no",
            environment=passphrase,
            volumes=where,
        ),
        "handout": handing | {"restart": "no", "depends_on": {"prepare": done}},
        "handout-again": handing | {"command": ["sh", "/handout.sh", "--follow"], "depends_on": {"handout": done}},
        "gateway": container(
            [
                *("tacit", "server", "gateway", "--home", "/run/tacit-gateway"),
                *("--bell", str(BELL), "--bell-group", str(_BELL_NUMBER)),
            ],
            user=users[GATEWAY],
            image=image,
            group_add=[str(_BELL_NUMBER)],
            ports=[f"{ports[0]}:{ports[0]}"],
            sysctls={"net.ipv4.ip_unprivileged_port_start": "0"},
            volumes=each["gateway"],
            # What is in memory is there as long as somebody has it mounted.
            depends_on={"handout": done, "handout-again": {"condition": "service_started"}},
        ),
        # On the gateway's loopback, and on no other network.
        "relay": container(
            ["tacit", "server", "relay", "--home", "/var/lib/tacit-relay"],
            user=users[RELAY],
            image=image,
            network_mode="service:gateway",
            volumes=each["relay"],
            depends_on={"handout": done},
        ),
        "enrolment": container(
            ["tacit", "server", "enrol", "--home", at],
            user=own,
            image=image,
            ports=[f"{ports[1]}:{ports[1]}"],
            sysctls={"net.ipv4.ip_unprivileged_port_start": "0"},
            environment=passphrase,
            # Nothing of the server application's is there.
            volumes=[*where, f"/dev/null:{at}/application/server.key:ro"],
            depends_on={"prepare": done},
        ),
        "application": container(
            ["tacit", "server", "run", "--home", at, "/job/scenario.toml"],
            user=own,
            image=image,
            network_mode="service:gateway",
            restart="no",
            profiles=["job"],
            environment=opens,
            group_add=[str(_BELL_NUMBER)],
            volumes=[*where, bell, "./job:/job"],
        ),
    }
    comment = (
        "The processes of a server. Build the image first; see Containerfile.\n"
        "Start: docker compose up -d      A job: docker compose run --rm application"
    )
    return compose(services, ["relay", "bell"], comment, memory=["gateway"])


def _number(owner: str) -> str:
    try:
        known = pwd.getpwnam(owner)
        return f"{known.pw_uid}:{known.pw_gid}"
    except KeyError:
        return "10001:10001"
