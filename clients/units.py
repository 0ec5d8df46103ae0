"""Systemd units and a compose file for the processes of a data holder's machine (guarantee G15).

prepare      once per start, as the owner of the home: ports, certificates
handout      root, a shell script: gives tunnel and Flower's processes copies of the few files that they need
worker       as the owner: data, ledger, keys; no network at all, a socket for the group tacit-post
tunnel       a user of its own; has the connection's certificate, and no other key
supernode    Flower's, with the courier under one user; reach this machine alone, and see no file of the owner
courier      the same user; the one in the group tacit-post
renew        once a day, as the owner: a new certificate after two thirds of the old one's life
metrics      where they are asked for: as the owner, who is kept from the data; figures on loopback for Prometheus
"""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Final

from clients.home import ClientHome
from privacy.exposition import place
from privacy.unit_files import (
    CONTAINERFILE,
    POST,
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

_NAME: Final = "tacit-client"
TUNNEL, FLOWER = "tacit-tunnel", "tacit-flower"
_NUMBERS: Final = {TUNNEL: 10011, FLOWER: 10012}
_SOCKET: Final = "/run/tacit-worker/worker.sock"
# Seconds: a round that is on is finished before its courier ends.
_ROUND_S: Final = 600
# What opens the home's keyring, where it has a passphrase, stands in a file that only root reads. So does which GPU the
# worker takes (CUDA_VISIBLE_DEVICES), and how many cores (OMP_NUM_THREADS): the holder's to say.
_OPENS: Final = "EnvironmentFile=-/etc/tacit/client.env"
GIFTS: Final = [
    *(
        Gift(user=TUNNEL, variable="TACIT_TUNNEL_USER", folder="/run/tacit-tunnel", file=file)
        for file in ("client.json", "ca.pem", "keys/tls.pem", "run/ports", "run/loopback.pem")
    ),
    *(
        Gift(user=FLOWER, variable="TACIT_FLOWER_USER", folder="/run/tacit-flower", file=file)
        for file in ("keys/supernode.key", "run/ports", "run/runtime.secret", "run/loopback-ca.pem")
    ),
]


def files_of(
    home: ClientHome,
    *,
    owner: str,
    program: str,
    folder: Path,
    version: str,
    device: str = "cpu",
    metrics: str | None = None,
) -> dict[str, str]:
    """Returns the files' texts by name.

    Args:
        home: Of a client that has joined.
        owner: Who owns it.
        program: Path of the ``tacit`` program.
        folder: Where the files will lie; units name the script there.
        version: Of this Tacit, for the image's tag.
        device: Where training runs.
        metrics: "HOST:PORT" on loopback where figures are served, or its port; None for nowhere.

    Raises:
        IdentityError: The client has not joined.
        PlanError: There is no such place for metrics, or it is not on loopback.
    """
    at, settings = str(home.folder), home.settings
    # A ledger that lies elsewhere is written there too.
    writes = list(dict.fromkeys([at, *([] if settings.ledger.startswith(f"{at}/") else [settings.ledger])]))
    secret = [*writes, *(path for path in (settings.data, settings.keys) if path)]
    homes = under_homes([program, str(folder), *secret])
    tacit = [program, "client"]
    part_of = f"{_NAME}.target"
    prepare, hand = f"{_NAME}-prepare.service", f"{_NAME}-handout.service"
    worker, tunnel, supernode = (f"{_NAME}-{name}.service" for name in ("worker", "tunnel", "supernode"))
    on_gpu = device != "cpu"
    services = {
        worker: Service(
            name="worker",
            text="the worker, which holds data, ledger and keys",
            command=[
                *(*tacit, "worker", "--home", at, "--socket", _SOCKET),
                *("--courier-group", POST, "--device", device),
            ],
            user=owner,
            after=[prepare],
            networks=["AF_UNIX", *(["AF_NETLINK"] if on_gpu else [])],
            writes=writes,
            executable_memory=True,
            devices=on_gpu,
            grace_s=_ROUND_S,
            more=[
                "PrivateNetwork=yes",
                _OPENS,
                f"SupplementaryGroups={POST}",
                "RuntimeDirectory=tacit-worker",
                # Others may pass; the socket itself is for its group.
                "RuntimeDirectoryMode=0711",
                *(f"ReadOnlyPaths={path}" for path in secret[len(writes) :]),
            ],
        ),
        tunnel: Service(
            name="tunnel",
            text="the tunnel to the gateway",
            command=[*tacit, "tunnel", "--home", "/run/tacit-tunnel"],
            user=TUNNEL,
            after=[hand],
            writes=["/run/tacit-tunnel"],
            hidden=secret,
        ),
        supernode: Service(
            name="supernode",
            text="Flower's SuperNode",
            command=[*tacit, "supernode", "--home", "/run/tacit-flower"],
            user=FLOWER,
            after=[hand, tunnel],
            local=True,
            writes=["/run/tacit-flower"],
            hidden=secret,
        ),
        f"{_NAME}-courier.service": Service(
            name="courier",
            text="the courier between SuperNode and worker",
            command=[*tacit, "courier", "--home", "/run/tacit-flower", "--socket", _SOCKET],
            user=FLOWER,
            after=[worker, supernode],
            local=True,
            writes=["/run/tacit-flower"],
            hidden=secret,
            grace_s=_ROUND_S,
            more=[f"SupplementaryGroups={POST}"],
        ),
    }
    if metrics is not None:
        place(metrics, loopback=True)
        services[f"{_NAME}-metrics.service"] = Service(
            name="metrics",
            text="figures of this client for Prometheus",
            command=[*tacit, "metrics", metrics, "--home", at],
            user=owner,
            after=[prepare],
            local=True,
            hidden=[settings.data] if settings.data else [],
        )
    renew = Service(
        name="renew",
        text="renews the certificate when it is due",
        command=[*tacit, "renew", "--if-due", "--home", at],
        user=owner,
        writes=[at],
        more=[_OPENS],
    )
    prepared = Service(
        name="prepare",
        text="ports and certificates of the client",
        command=[*tacit, "prepare", "--home", at],
        user=owner,
        writes=[at],
        more=["RemainAfterExit=yes", _OPENS],
    )
    script = folder / f"{_NAME}-handout.sh"
    timer = (
        "[Unit]\nDescription=Tacit: looks once a day whether the certificate is to be renewed\n"
        f"PartOf={part_of}\n\n[Timer]\nOnBootSec=10min\nOnUnitActiveSec=1d\nRandomizedDelaySec=1h\n\n"
        f"[Install]\nWantedBy={part_of}\n"
    )
    units = {
        prepare: prepared.unit(part_of, homes=homes, once=True),
        **handout_units(
            _NAME,
            str(script),
            prepared=prepare,
            watched=[home.tls, home.folder / "client.json"],
            homes=homes,
            more=[_OPENS],
        ),
        **{name: service.unit(part_of, homes=homes) for name, service in services.items()},
        f"{_NAME}-renew.timer": timer,
    }
    return units | {
        f"{_NAME}-renew.service": renew.unit(part_of, homes=homes, once=True),
        part_of: target("worker, tunnel, SuperNode and courier", sorted(units)),
        script.name: handout(home.folder, owner, GIFTS, program=program),
        f"{_NAME}.sysusers": sysusers(
            {TUNNEL: "Tacit: the tunnel", FLOWER: "Tacit: SuperNode and courier"}, [POST], [(FLOWER, POST)]
        ),
        "compose.yaml": _compose(home, owner, script.name, version, device),
        "Containerfile": CONTAINERFILE.format(folder=folder, version=version, post=POST_NUMBER),
    }


def _compose(home: ClientHome, owner: str, script: str, version: str, device: str) -> str:
    at, settings = str(home.folder), home.settings
    own, image = _number(owner), f"tacit:{version}"
    users = {name: f"{number}:{number}" for name, number in _NUMBERS.items()}
    numbers = {
        "TACIT_OWNER": own.partition(":")[0],
        "TACIT_TUNNEL_USER": str(_NUMBERS[TUNNEL]),
        "TACIT_FLOWER_USER": str(_NUMBERS[FLOWER]),
        "TACIT_PROGRAM": "tacit",
    }
    # At the same paths as outside, because the home names them.
    owned = [f"{at}:{at}"]
    owned += [] if settings.ledger.startswith(f"{at}/") else [f"{settings.ledger}:{settings.ledger}"]
    data = [f"{path}:{path}:ro" for path in (settings.data, settings.keys) if path and not path.startswith(f"{at}/")]
    tunnel, flower, post = "tunnel:/run/tacit-tunnel", "flower:/run/tacit-flower", "post:/run/tacit-worker"
    make_room = f"install -d -m 0711 -o {own.partition(':')[0]} /run/tacit-worker && exec sh /handout.sh"
    opens = {"TACIT_VAULT_PASSPHRASE": "${TACIT_VAULT_PASSPHRASE:-}"}
    handing = container(
        ["sh", "-c", make_room],
        user="0:0",
        image=image,
        network_mode="none",
        environment=numbers | opens,
        cap_add=["CHOWN", "DAC_READ_SEARCH", "FOWNER", "SETUID", "SETGID"],
        volumes=[f"{at}:{at}:ro", tunnel, flower, post, f"./{script}:/handout.sh:ro"],
    )
    done, running = {"condition": "service_completed_successfully"}, {"condition": "service_started"}
    once = {"network_mode": "none", "restart": "no", "environment": opens}
    services: dict[str, dict[str, object]] = {
        "prepare": container(
            ["tacit", "client", "prepare", "--home", at], user=own, image=image, volumes=owned, **once
        ),
        "handout": handing | {"restart": "no", "depends_on": {"prepare": done}},
        "handout-again": handing | {"command": ["sh", "/handout.sh", "--follow"], "depends_on": {"handout": done}},
        "worker": container(
            [
                *("tacit", "client", "worker", "--home", at, "--socket", _SOCKET),
                *("--courier-group", POST, "--device", device),
            ],
            user=own,
            image=image,
            network_mode="none",
            # Names without a value are as they are where `docker compose` is called, and not at all where they are not.
            environment=opens | dict.fromkeys(("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS")),
            group_add=[str(POST_NUMBER)],
            stop_grace_period=f"{_ROUND_S}s",
            volumes=[*owned, *data, post],
            depends_on={"handout": done},
            **({"gpus": "all"} if device != "cpu" else {}),
        ),
        "tunnel": container(
            ["tacit", "client", "tunnel", "--home", "/run/tacit-tunnel"],
            user=users[TUNNEL],
            image=image,
            volumes=[tunnel],
            # What is in memory is there as long as somebody has it mounted.
            depends_on={"handout": done, "handout-again": running},
        ),
        "supernode": container(
            ["tacit", "client", "supernode", "--home", "/run/tacit-flower"],
            user=users[FLOWER],
            image=image,
            network_mode="service:tunnel",
            volumes=[flower],
            depends_on={"handout": done, "tunnel": running},
        ),
        "courier": container(
            ["tacit", "client", "courier", "--home", "/run/tacit-flower", "--socket", _SOCKET],
            user=users[FLOWER],
            image=image,
            network_mode="service:tunnel",
            group_add=[str(POST_NUMBER)],
            stop_grace_period=f"{_ROUND_S}s",
            volumes=[flower, f"{post}:ro"],
            depends_on={"worker": running, "supernode": running},
        ),
        "renew": container(
            ["sh", "-c", f"while sleep 86400; do tacit client renew --if-due --home {at}; done"],
            user=own,
            image=image,
            environment=opens,
            volumes=[f"{at}:{at}"],
            depends_on={"prepare": done},
        ),
    }
    comment = (
        "The processes of a data holder. Build the image first; see Containerfile.\n"
        "Start: docker compose up -d      How it goes: docker compose exec worker tacit client status --home "
        f"{at}"
    )
    return compose(services, ["post"], comment, memory=["tunnel", "flower"])


def _number(owner: str) -> str:
    try:
        known = pwd.getpwnam(owner)
        return f"{known.pw_uid}:{known.pw_gid}"
    except KeyError:
        return "10001:10001"
