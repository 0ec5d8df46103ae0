"""A server's home, its endpoint on loopback and a client's choices, for tests of enrolment."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from clients.home import ClientHome, Policy
from clients.join import Choices
from privacy.enrolment import (
    LENGTH,
    Address,
    Invitation,
    body_of,
    prove,
    signed,
    stored_of,
    to_base64,
    transcript,
)
from privacy.identity import Identity
from privacy.identity.authority import Authority, certificate_request, new_key, read_certificate, sign_with_key
from privacy.identity.supernode import new_supernode_key, sign_supernode, supernode_public
from privacy.plan import canonical
from server.enrol import Desk, Limits, listen, serve
from server.home import ServerHome

HOST = "127.0.0.1"
CHOICES = Choices(task="digits", data="", policy=Policy(epsilon=2.0, delta=1e-5, records_bound=5000, allow_metrics=()))


def make_home(folder: Path, port: int = 29444, *, hosts: tuple[str, ...] = (HOST,), passphrase: str = "") -> ServerHome:
    """Makes a server's home whose enrolment endpoint is on a port of loopback."""
    return ServerHome.create(
        folder,
        name="demo",
        addresses=[Address(host, 29443) for host in hosts],
        enrol=[Address(host, port) for host in hosts],
        passphrase=passphrase,
    )


def authority_of(home: ServerHome) -> Authority:
    """Returns a home's authority."""
    return Authority.read(home.folder / "authority")


@dataclasses.dataclass
class Running:
    """An endpoint that runs in a thread."""

    home: ServerHome
    listener: socket.socket


@contextlib.contextmanager
def running(folder: Path, limits: Limits | None = None, *, hosts: tuple[str, ...] = (HOST,)) -> Iterator[Running]:
    """Makes a home and runs its endpoint while the block lasts."""
    listener = listen(HOST, 0)
    home = make_home(folder, listener.getsockname()[1], hosts=hosts)
    with serving(home, listener, limits):
        yield Running(home, listener)


@contextlib.contextmanager
def serving(home: ServerHome, listener: socket.socket, limits: Limits | None = None) -> Iterator[None]:
    """Runs the endpoint of a home while the block lasts; fails if it did not end by itself."""
    stop, faults = threading.Event(), []

    def run() -> None:
        try:
            serve(home, authority_of(home), listener, limits=limits or Limits(burst=10_000), stop=stop)
        except BaseException as error:
            faults.append(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
        assert not faults


def tls(port: int, timeout_s: float = 10) -> ssl.SSLSocket:
    """Connects to an endpoint as anybody can."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    raw = socket.create_connection((HOST, port), timeout=timeout_s)
    return context.wrap_socket(raw, server_hostname=HOST)


def receive(connection: ssl.SSLSocket) -> bytes:
    """Reads one message, or b'' where the connection ends first."""
    data = b""
    while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack(data[: LENGTH.size])[0]:
        part = connection.recv(65536)
        if not part:
            return b""
        data += part
    return data[LENGTH.size :]


class Keys:
    """A client's keys, and the requests that it makes with them."""

    def __init__(self) -> None:
        self.application = Identity(os.urandom(32))
        self.supernode = new_supernode_key()
        self.tls = new_key()

    def join_body(self, invitation: Invitation, /, **changed: object) -> bytes:
        """Returns the first line of a join."""
        fields: dict[str, object] = {
            "application": self.application.public_key,
            "invitation": stored_of(invitation.secret).id,
            "name": invitation.name,
            "request": to_base64(certificate_request(self.tls, invitation.name)),
            "supernode": supernode_public(self.supernode),
            "tacit": "0.1.0",
        }
        return body_of("join", **(fields | changed))

    def join(self, secret: bytes, body: bytes, hello: bytes, leaf: bytes, **changed: str) -> bytes:
        """Returns a whole join with its proofs."""
        over = transcript("join", hello, leaf, body)
        proofs = {
            "application": self.application.sign(signed("application", over)),
            "proof": prove(secret, over),
            "supernode": sign_supernode(self.supernode, signed("supernode", over)),
        }
        return body + b"\n" + canonical(proofs | changed)

    def renewal(self, name: str, serial: str, hello: bytes, leaf: bytes, key: bytes, version: str = "0.1.0") -> bytes:
        """Returns a whole renewal for a new key with its proofs."""
        request = to_base64(certificate_request(key, name))
        body = body_of("renew", name=name, request=request, serial=serial, tacit=version)
        over = transcript("renew", hello, leaf, body)
        proofs = {
            "application": self.application.sign(signed("application", over)),
            "certificate": sign_with_key(self.tls, signed("certificate", over)),
        }
        return body + b"\n" + canonical(proofs)


class Counter:
    """A desk without a network: greets, and answers what it is asked."""

    def __init__(self, home: ServerHome, desk: Desk | None = None) -> None:
        self.home = home
        self.desk = desk or Desk(home, authority_of(home))
        self.leaf = read_certificate(home.endpoint_tls)

    def join(self, keys: Keys, invitation: Invitation, **changed: object) -> bytes:
        """Joins once, as a client would."""
        hello = self.desk.hello()
        body = keys.join_body(invitation, **changed)
        return self.desk.answer(hello, self.leaf, keys.join(invitation.secret, body, hello, self.leaf))


def client(folder: Path) -> ClientHome:
    """Returns a client's home that has not joined."""
    return ClientHome(folder)
