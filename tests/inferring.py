"""A trained run, a federation on loopback and an inference service in a thread, for tests of encrypted inference."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clients.home import ClientHome
from clients.inference import Asker
from clients.inference import Service as Way
from privacy.enrolment import Address
from server.door import Threshold
from server.enrol import Registry
from server.heads import Published, Terms
from server.home import ServerHome
from server.inference import Service, limits_of
from simulations.inference import federation, published_of
from simulations.run import simulate
from simulations.scenario import Scenario

T = TypeVar("T")
QUICK = Terms(queries=1000, session_s=600, rate=1e6, allowance=1_000_000)


class Quiet:
    """An observer of runs that says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@dataclasses.dataclass
class World:
    """What tests share: it takes seconds to make, and they change nothing of it."""

    run: Path
    home: ServerHome
    clients: list[ClientHome]
    published: Published


def make_world(folder: Path, *, rounds: int = 3, clients: int = 4) -> World:
    """Trains the main job for some rounds, makes a federation with two clients and publishes the head."""
    simulate(
        Scenario.layered(None, {"rounds": rounds, "clients": clients}),
        out=folder / "run",
        observer=Quiet(),
    )
    home, members = federation(folder, ("clinic-a", "clinic-b"))
    return World(folder / "run", home, members, published_of(folder / "run", home, terms=QUICK))


def with_terms(published: Published, **changes: Any) -> Published:
    """Returns a published head under other terms; what is told to clients follows."""
    terms = dataclasses.replace(published.terms, **changes)
    offer = dataclasses.replace(published.offer, queries=terms.queries, session_s=terms.session_s, rate=terms.rate)
    return dataclasses.replace(published, terms=terms, offer=offer)


class Staged:
    """A service that runs in a thread of its own."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop, world: World, folder: Path) -> None:
        self.service, self.loop, self.world, self.folder = service, loop, world, folder
        self._ways: dict[int, Way] = {}

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.service.port)

    def do(self, work: Coroutine[Any, Any, T], patience_s: float = 60.0) -> T:
        """Runs something in the service's loop and returns its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(patience_s)

    def way(self, client: int = 0) -> Way:
        if client not in self._ways:
            self._ways[client] = Way.of(self.world.clients[client], self.address)
        return self._ways[client]

    def close(self) -> None:
        for way in self._ways.values():
            way.close()

    def asker(self, client: int = 0, queries: int = 0) -> Asker:
        return Asker.begin(self.way(client), self.world.clients[client].identity(), queries=queries)


@contextlib.contextmanager
def staged(
    world: World,
    folder: Path,
    published: Sequence[Published] = (),
    *,
    evaluators: int = 1,
    memory_bytes: int = 2 << 30,
    clock: Callable[[], float] = time.time,
    make: Callable[..., Service] = Service,
) -> Iterator[Staged]:
    """Runs a service over TLS on loopback while the block lasts."""
    registry, heads = Registry.of(world.home), list(published) or [world.published]

    def key_of(name: str) -> str | None:
        member = registry.members().get(name)
        return member.application if member is not None else None

    service = make(
        Threshold(
            host="127.0.0.1",
            port=0,
            certificate=world.home.relay_tls,
            key=world.home.relay_tls,
            authority=world.home.folder / "relay" / "ca.pem",
            limits=limits_of(heads),
            recheck_s=0.2,
        ),
        registry.name_of,
        key_of,
        heads,
        world.home.application_identity(),
        folder,
        world.home.application_secret(),
        evaluators=evaluators,
        memory_bytes=memory_bytes,
        clock=clock,
    )
    loop = asyncio.new_event_loop()
    started: list[BaseException | None] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        try:
            await service.start()
        except BaseException as error:
            started.append(error)
            ready.set()
            return
        ready.set()
        await stop.wait()
        await service.close()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(120)
    try:
        if started:
            raise started[0] or AssertionError
        on = Staged(service, loop, world, folder)
        try:
            yield on
        finally:
            on.close()
    finally:
        if not started:
            loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive()
