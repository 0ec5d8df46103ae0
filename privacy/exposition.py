"""Figures for a monitoring system, in Prometheus' text format, over HTTP on one address of this machine.

What is shown is chosen by who calls `serve`; nothing here knows a name or a record. Served from a thread, with the
standard library alone: one path, one method, a few seconds for each request.
"""

from __future__ import annotations

import dataclasses
import http.server
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from privacy.errors import PlanError, RunError, TacitError

_NAME: Final = re.compile(r"tacit_[a-z_]+")
_LABEL: Final = re.compile(r"[a-z_]+")
_HEAD_S: Final = 5.0
_log = logging.getLogger("tacit.metrics")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One metric.

    Attributes:
        name: Begins with ``tacit_``; that of a counter ends with ``_total``.
        text: What it is, one line.
        values: Its values, each with its labels.
    """

    name: str
    text: str
    values: Sequence[tuple[Mapping[str, str], float]]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"expected a name of a metric, got {self.name!r}")

    @property
    def kind(self) -> str:
        """Counter or gauge."""
        return "counter" if self.name.endswith("_total") else "gauge"


def one(name: str, text: str, value: float) -> Figure:
    """Returns a figure without labels."""
    return Figure(name, text, [({}, value)])


def rendered(figures: Iterable[Figure]) -> str:
    """Returns the text that a scraper reads."""
    lines = []
    for figure in figures:
        lines += [f"# HELP {figure.name} {figure.text}", f"# TYPE {figure.name} {figure.kind}"]
        for labels, value in figure.values:
            told = ",".join(f'{_label(name)}="{_escaped(text)}"' for name, text in labels.items())
            lines.append(f"{figure.name}{'{' + told + '}' if told else ''} {float(value)!r}")
    return "\n".join(lines) + "\n"


def _label(name: str) -> str:
    if not _LABEL.fullmatch(name):
        raise ValueError(f"expected a name of a label, got {name!r}")
    return name


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def place(text: str, *, loopback: bool) -> tuple[str, int]:
    """Reads "HOST:PORT", or a port alone, which is one on loopback.

    Args:
        text: What was given.
        loopback: Whether no other host will do.

    Raises:
        PlanError: It is none, or not on loopback.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or not 0 <= int(port) < 65536:
        raise PlanError(f"expected HOST:PORT or PORT for the metrics, got {text[:80]!r}; write 127.0.0.1:9464")
    if loopback and not is_loopback(host):
        raise PlanError(
            f"expected a loopback address for the metrics, got {host}; what a data holder has spent is its own "
            "affair: write 127.0.0.1:9464"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Says whether a host is this machine by its very name."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


class Exposition:
    """Serves figures until it is closed."""

    def __init__(self, host: str, port: int, collect: Callable[[], Iterable[Figure]]) -> None:
        """Listens, and serves from a thread.

        Args:
            host: Address of this machine.
            port: TCP port, 0 for a free one.
            collect: Returns the figures of now; called for each request. Where it fails, the answer is 503 and no
                more: why it failed is in the log.

        Raises:
            RunError: The address cannot be had.
        """
        local = is_loopback(host)

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = _HEAD_S
            server_version, sys_version = "tacit", ""

            def do_GET(self) -> None:
                asked = self.headers.get("Host", "")
                called = asked.rpartition(":")[0] if re.search(r":\d+$", asked) else asked
                if local and not is_loopback(called.strip("[]")):
                    # A page in a browser of this machine that calls us by a name of its own.
                    self.send_error(403)
                    return
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                try:
                    body = rendered(collect()).encode()
                except (TacitError, OSError, ValueError, KeyError, TypeError):
                    _log.exception("the metrics could not be collected")
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Says nothing: a line for every scrape tells nobody anything."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise RunError(
                f"expected to listen on {host}:{port} for the metrics, got: {error.strerror}; choose another --metrics"
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()


def of_processes(restarts: Mapping[str, int], parts: Mapping[str, bool], faults: int) -> list[Figure]:
    """Returns what a supervisor knows: how often parts were started again, which run, how many chores fail."""
    return [
        Figure(
            "tacit_process_restarts_total",
            "How often a process was started again.",
            [({"process": name}, count) for name, count in restarts.items()],
        ),
        Figure(
            "tacit_process_up",
            "Whether a process runs.",
            [({"process": name}, float(up)) for name, up in parts.items()],
        ),
        one("tacit_chore_faults", "Chores, such as renewing a certificate, that failed the last time.", faults),
    ]
