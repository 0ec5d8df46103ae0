"""The Ray engine: the same apps under Flower's own simulation, for a machine or a cluster with Ray.

Flower's front doors are a deprecated function that cannot pass a run config and a command that wants an app
folder; both run the `ServerApp` in a thread, where Ctrl-C and a crash of Ray leave it waiting for ever. This
module starts the same parts (link state, in-memory grid, virtual client engine on Ray) the other way round:
the `ServerApp` here, the engine in a thread. Flower promises few of those parts; they are used here only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import logging
import os
import secrets
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend.backend import Backend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory, in_memory_linkstate
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.serverapp import ServerApp
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from privacy.errors import RunError
from simulations.engine import load_app

# Read by Ray and Flower in this process and in the processes Ray starts: no usage reports to anyone, no
# automatic environments, no advice about accelerators nobody asked for.
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run_on_ray(
    server_app: ServerApp | str,
    client_app: ClientApp | str,
    *,
    nodes: int,
    run_config: UserConfig,
    cpus_per_client: float = 1,
    gpus_per_client: float = 0.0,
    app_dir: Path | None = None,
) -> None:
    """Runs a `ServerApp` and its clients under Flower's simulation on Ray; returns when the server is done.

    A Ray cluster named by the environment variable ``RAY_ADDRESS`` is used, otherwise one is started here.

    Args:
        server_app: The server, or where to find it (``module:attribute``).
        client_app: The client, or where to find it; Ray's processes import what it is made of.
        nodes: How many clients there are, at least 1.
        run_config: What server and clients find in ``context.run_config``.
        cpus_per_client: Cores a client gets while it runs, > 0.
        gpus_per_client: Share of an accelerator a client gets while it runs, >= 0.
        app_dir: Folder the apps are imported from, where they are not installed.

    Raises:
        RunError: Ray is not installed, does not start, cannot give a client its resources, or breaks down.
            What the `ServerApp` raises is not changed.
    """
    if nodes < 1 or cpus_per_client <= 0 or gpus_per_client < 0:
        raise RunError(
            "expected nodes >= 1, cpus_per_client > 0 and gpus_per_client >= 0, "
            f"got {nodes}, {cpus_per_client} and {gpus_per_client}; correct them"
        )
    if importlib.util.find_spec("ray") is None:
        raise RunError("expected Ray for the Ray engine, got no such package; install 'flwr[simulation]'")
    server = load_app(server_app, ServerApp, app_dir) if isinstance(server_app, str) else server_app
    if isinstance(client_app, str):
        load_app(client_app, ClientApp, app_dir)
    with _quiet():
        _start_ray(cpus_per_client, gpus_per_client)
        try:
            client = _Configured(client_app, app_dir, dict(run_config))
            _serve(server, client, nodes, run_config, cpus_per_client, gpus_per_client)
        finally:
            _stop_ray()


class _Configured(ClientApp):
    """A `ClientApp` that sees our run config; Flower's simulation fills it from an installed app only."""

    def __init__(self, app: ClientApp | str, app_dir: Path | None, run_config: UserConfig) -> None:
        super().__init__()
        self._app = app
        self._app_dir = app_dir
        self._run_config = run_config

    def __call__(self, message: Message, context: Context) -> Message:
        app = self._app
        if isinstance(app, str):
            app = load_app(app, ClientApp, self._app_dir)
        # Taken back afterwards: Flower refuses a context that returns with another run config.
        before, context.run_config = context.run_config, dict(self._run_config)
        try:
            return app(message, context)
        finally:
            context.run_config = before


class _Grid(InMemoryGrid):
    """Flower's in-memory grid, which gives up waiting for an engine that has broken down."""

    def __init__(self, state_factory: LinkStateFactory) -> None:
        super().__init__(state_factory)
        self.breakdown: BaseException | None = None

    def get_node_ids(self) -> Iterable[int]:
        self._check()
        return super().get_node_ids()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._check()
        return super().pull_messages(message_ids)

    def _check(self) -> None:
        if self.breakdown is not None:
            raise RunError(
                f"expected Flower's Ray engine to run, got {self.breakdown!r}; use engine=local"
            ) from self.breakdown


def _serve(server: ServerApp, client: ClientApp, nodes: int, run_config: UserConfig, cpus: float, gpus: float) -> None:
    """Runs the server here and the virtual clients in a thread; both have ended when this returns."""
    run = Run.create_empty(secrets.randbits(63))
    run.primary_task_id = 1
    run.federation_id = NOOP_FEDERATION_ID
    # The link state takes messages from this id only.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID
    states = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = states.state()
    if not isinstance(state, InMemoryLinkState):
        raise RunError(f"expected an in-memory link state from Flower, got {type(state).__name__}; use flwr 1.41")
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[run.primary_task_id] = Task(task_id=run.primary_task_id, run_id=run.run_id)
    # Before the server starts, so that it never sees a federation without clients.
    partitions = _register(nodes, states)
    grid = _Grid(states)
    grid.set_run(run)
    stop = threading.Event()

    def simulate() -> None:
        try:
            vce_api.run_api(
                app_fn=lambda: client,
                backend_fn=lambda: _backend(cpus, gpus),
                nodes_mapping=partitions,
                state_factory=states,
                node_info_stores=vce_api._register_node_info_stores(partitions, run),
                f_stop=stop,
                metrics=VceMetrics(),
            )
        except BaseException as error:
            # Flower wraps what happened into a RuntimeError that does not say it.
            grid.breakdown = error.__cause__ or error

    engine = threading.Thread(target=simulate, name="tacit-ray")
    engine.start()
    try:
        server(
            grid=grid,
            context=Context(
                run_id=run.run_id,
                node_id=SUPERLINK_NODE_ID,
                node_config={},
                state=RecordDict(),
                run_config=dict(run_config),
            ),
        )
    finally:
        stop.set()
        engine.join()


def _register(nodes: int, states: LinkStateFactory) -> dict[int, int]:
    """Makes the virtual clients, numbered upwards from Flower's own number for its server; index by number.

    Flower draws random numbers; a run could then not be resumed, because nobody would know whose receipt was whose.
    """
    numbers = itertools.count(SUPERLINK_NODE_ID + 1)
    flower: Any = in_memory_linkstate
    before = flower.generate_rand_int_from_bytes
    flower.generate_rand_int_from_bytes = lambda *_, **__: next(numbers)
    try:
        return vce_api._register_nodes(nodes, states)
    finally:
        flower.generate_rand_int_from_bytes = before


def _backend(cpus: float, gpus: float) -> Backend:
    """Flower's pool of Ray actors; imported late, because it imports Ray."""
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

    return RayBackend({"client_resources": {"num_cpus": cpus, "num_gpus": gpus}})


def _start_ray(cpus: float, gpus: float) -> None:
    """Connects to Ray or starts it, and makes sure that it can run a client at all."""
    ray: Any = importlib.import_module("ray")
    if not ray.is_initialized():
        # Ray's processes find modules by the environment, not by this process's sys.path.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
            )
        except Exception as error:
            raise RunError(f"expected Ray to start, got {error!r}; see Ray's log, or use engine=local") from error
    room = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in room):
        _stop_ray()
        got = [f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in room]
        raise RunError(
            f"expected a Ray node with {cpus:g} CPUs and {gpus:g} GPUs for one client, "
            f"got nodes with {', '.join(got)}; ask for less per client"
        )


def _stop_ray() -> None:
    """Ends Ray in this process; the second time nothing happens."""
    ray: Any = importlib.import_module("ray")
    ray.shutdown()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves Flower's log the errors only, and Ray and Flower no reports to send, for a while."""
    log = logging.getLogger("flwr")
    level = log.level
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
