"""The gateway and two tunnels between a real SuperLink and two real SuperNodes, all processes on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
from base64 import b64encode
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from clients.tunnel import Tunnel, Way
from privacy.identity import Identity, sign_bundle
from server.gateway import Door, Gateway
from tests.certificates import Authority, common_name

ROOT = Path(__file__).parents[2]
APP = ROOT / "tests" / "apps" / "deployed"
BINARIES = Path(sys.executable).parent
NODES = ("hospital", "bank")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Starts processes with nothing of this machine's Flower settings, and ends every one of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
            "PATH": f"{BINARIES}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        self._running: list[asyncio.subprocess.Process] = []

    async def start(self, name: str, *command: str | Path, talks: bool = False) -> asyncio.subprocess.Process:
        with (self._folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *map(str, command),
                env=self._environment,
                cwd=self._folder,
                stdin=asyncio.subprocess.PIPE if talks else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if talks else log,
                stderr=log,
            )
        self._running.append(process)
        return process

    async def stop(self) -> None:
        for process in self._running:
            if process.returncode is None:
                process.terminate()
        for process in self._running:
            try:
                await asyncio.wait_for(process.wait(), 15)
            except TimeoutError:
                process.kill()
                await process.wait()

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")


@pytest.mark.slow
def test_a_run_of_real_processes_through_the_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SuperNode authentication on, TLS on every leg; a signed bundle runs, an unsigned one does not."""
    times: list[float] = []

    async def scenario() -> None:
        loopback, authority = Authority(tmp_path / "loopback"), Authority(tmp_path / "federation")
        local, link = loopback.leaf("local", server=True), free_port()
        keys, fields = {}, {}
        for name in NODES:
            private = ec.generate_private_key(ec.SECP384R1())
            keys[name] = tmp_path / f"{name}.ssh"
            keys[name].write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
            fields[name] = b64encode(public_key_to_bytes(private.public_key()))
        operator = Identity(bytes(32))
        wake = tmp_path / "wake"
        certificate, key = authority.leaf("gateway", server=True)
        gateway = Gateway(
            Door(
                host="127.0.0.1",
                port=0,
                certificate=certificate,
                key=key,
                authority=authority.pem,
                upstream_port=link,
                upstream_authority=loopback.pem,
                wake=wake,
            ),
            common_name,
            fields.get,
        )
        await gateway.start()
        processes, tunnels = Processes(tmp_path), []
        try:
            await processes.start(
                "superlink", BINARIES / "flower-superlink", "--host", "127.0.0.1", "--port", str(link),
                "--ssl-certfile", local[0], "--ssl-keyfile", local[1], "--ssl-ca-certfile", loopback.pem,
                "--enable-supernode-auth", "--database", tmp_path / "state.db", "--isolation", "process",
                "--disable-runtime-dependency-installation",
            )  # fmt: skip
            side = await processes.start(
                "operator", sys.executable, APP / "operator_side.py", f"127.0.0.1:{link}", loopback.pem, wake,
                *keys.values(), talks=True,
            )  # fmt: skip
            assert side.stdout is not None
            assert side.stdin is not None

            async def line() -> dict[str, object]:
                assert side.stdout is not None
                text = await asyncio.wait_for(side.stdout.readline(), 120)
                assert text, processes.log("operator")[-3000:]
                return dict(json.loads(text))

            bundle = bytes.fromhex(str((await line())["bundle"]))
            for name in NODES:
                certificate, key = authority.leaf(name)
                tunnel = Tunnel(
                    Way(
                        gateway_host="127.0.0.1",
                        gateway_port=gateway.port,
                        authority=authority.pem,
                        certificate=certificate,
                        key=key.read_bytes(),
                        trusted=(operator.public_key,),
                        local_certificate=local[0],
                        local_key=local[1],
                    )
                )
                await tunnel.start()
                tunnels.append(tunnel)
                port = free_port()
                await processes.start(
                    name, BINARIES / "flower-supernode", "--superlink", f"127.0.0.1:{tunnel.port}",
                    "--root-certificates", loopback.pem, "--auth-supernode-private-key", keys[name],
                    "--isolation", "process", "--host", "127.0.0.1", "--port", str(port),
                )  # fmt: skip
                await processes.start(f"courier-{name}", sys.executable, APP / "courier.py", f"127.0.0.1:{port}")

            async def rounds(signature: str, number: int, wait: float) -> list[dict[str, object]]:
                assert side.stdin is not None
                order = {"signature": signature, "rounds": number, "wait": wait}
                side.stdin.write(json.dumps(order).encode() + b"\n")
                return [await line() for _ in range(number)]

            signed = await rounds(sign_bundle(operator, bundle), 5, 60.0)
            assert [found["right"] for found in signed] == [2] * 5, processes.log("hospital")[-3000:]
            assert not any(found["torch"] for found in signed)
            times.extend(float(str(found["seconds"])) for found in signed)
            # A bundle that nobody trusted signed: no reply, and the nodes are there for the next run.
            (unsigned,) = await rounds("", 1, 4.0)
            assert unsigned["right"] == 0
            assert all(tunnel.counters["bundle refused"] for tunnel in tunnels)
            (again,) = await rounds(sign_bundle(operator, bundle), 1, 60.0)
            assert again["right"] == 2
            assert set(gateway.clients) == set(NODES)
            assert gateway.counters["fault"] == 0
            assert not [word for word in gateway.counters if word.endswith((" 401", " 500"))]
        finally:
            await processes.stop()
            for tunnel in tunnels:
                await tunnel.close()
            await gateway.close()

    asyncio.run(scenario())
    with capsys.disabled():
        print(f"\nrounds: median {statistics.median(times):.2f} s, {[round(value, 2) for value in times]}")
