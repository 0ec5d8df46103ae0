"""The front door: the ``tacit`` command, and the few names that a user imports.

Everything heavy is imported where it is used, so that ``tacit --help`` and ``import tacit`` take a fraction
of a second: neither PyTorch nor Flower nor Opacus is loaded before a job starts.

Exit codes: 0 done, 1 unexpected, 2 bad plan or flag, 3 bad data, 4 bad ledger, 5 budget exceeded, 6 run
folder, engine or disk, 130 stopped with Ctrl-C (and resumable).
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from models.task import Task as Task
    from privacy.errors import BudgetExceeded as BudgetExceeded
    from privacy.errors import DataError as DataError
    from privacy.errors import LedgerError as LedgerError
    from privacy.errors import PlanError as PlanError
    from privacy.errors import RunError as RunError
    from privacy.errors import TacitError as TacitError
    from privacy.plan import Plan as Plan
    from simulations.run import simulate as simulate
    from simulations.scenario import Key
    from simulations.scenario import Scenario as Scenario

__version__: Final = "0.1.0"

_HOMES: Final = {
    "BudgetExceeded": "privacy.errors",
    "DataError": "privacy.errors",
    "LedgerError": "privacy.errors",
    "Plan": "privacy.plan",
    "PlanError": "privacy.errors",
    "RunError": "privacy.errors",
    "Scenario": "simulations.scenario",
    "TacitError": "privacy.errors",
    "Task": "models.task",
    "simulate": "simulations.run",
}

__all__ = [
    "BudgetExceeded",
    "DataError",
    "LedgerError",
    "Plan",
    "PlanError",
    "RunError",
    "Scenario",
    "TacitError",
    "Task",
    "main",
    "simulate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tacit' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


_ABOUT: Final = """\
Train one model across data holders who do not show each other their data, and say truly what it cost them in
privacy.
"""

_SIMULATE: Final = """\
Run a federation on this machine: the data is dealt to simulated clients, each of which trains under
record-level differential privacy with a ledger of its own. Without arguments: the handwritten digits of
scikit-learn, 10 clients, epsilon 3. Leaves a run folder with the resolved scenario, metrics, checkpoints,
ledgers and a report.
"""

_EXAMPLES: Final = """\
examples:
  tacit simulate                                        the whole job with its defaults
  tacit simulate --task digits-cnn --epsilon 8          another model and budget
  tacit simulate --noise-multiplier 1.1                 give the noise, let epsilon follow
  tacit simulate --partition dirichlet --alpha 0.3      clients whose labels are skewed
  tacit simulate hospital.toml --rounds 50              a scenario file, with one flag over it
  tacit simulate --resume runs/FOLDER                   go on after Ctrl-C or a crash
  tacit simulate --app ../quickstart --clients 10       any Flower Message-API app, on our local engine

scenario file: the same names as the flags, in TOML tables of any name. Flags win over the file, the file over
the task's own defaults, those over the defaults above.
  [job]                          [privacy]
  task = "digits"                epsilon = 3.0
  rounds = 30                    delta = 1e-5
"""


_METAVARS: Final = {str: "TEXT", int: "N", float: "X"}


class _Parser(argparse.ArgumentParser):
    """Raises our own errors: one sentence with the nearest valid name, never a usage dump."""

    def error(self, message: str) -> NoReturn:
        from privacy.errors import PlanError

        raise PlanError(f"{message}; '{self.prog} --help' shows what is possible")


class _Page(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(110, _columns()))


def _columns() -> int:
    from shutil import get_terminal_size

    return max(60, get_terminal_size((100, 24)).columns - 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ``tacit`` command.

    Args:
        argv: Arguments without the program's name; None reads the process' own, and ends the process afterwards.

    Returns:
        The exit code; see the module's docstring.
    """
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if argv is None:
        _leave(code)
    return code


def _run(argv: list[str]) -> int:
    from privacy.errors import RunError, TacitError

    try:
        return _dispatch(argv)
    except TacitError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:
        # The reader left (`tacit tasks | head`): nobody is there to be told, and Python must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename or "a file"
        return _fail(
            f"expected to read and write {where}, got {error.strerror or error}; "
            "free space or permissions, then go on with --resume",
            RunError.exit_code,
        )
    except Exception as error:
        # The last line of defence: a person gets a sentence, a developer gets the traceback on request.
        text = " ".join(str(error).split())
        return _fail(f"unexpected {type(error).__name__}: {text}; run again with TACIT_TRACE=1 to see where", 1)


def _fail(sentence: str, code: int) -> int:
    if os.environ.get("TACIT_TRACE") == "1":
        traceback.print_exc()
    print(f"tacit: {sentence}", file=sys.stderr)
    return code


def _dispatch(argv: list[str]) -> int:
    from privacy.errors import PlanError
    from simulations.scenario import nearest

    verbs = {"simulate": _simulate, "tasks": _tasks, "report": _report}
    parser = _Parser(prog="tacit", description=_ABOUT, formatter_class=_Page, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tacit {__version__}")
    kinds = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", parser_class=_Parser)
    _simulate_page(kinds)
    tasks = kinds.add_parser("tasks", help="what can be trained, on which data", formatter_class=_Page)
    tasks.add_argument("--json", action="store_true", help="one JSON object, for programs")
    report = kinds.add_parser("report", help="write a run's report again, from its folder", formatter_class=_Page)
    report.add_argument("run", metavar="RUN", type=Path, help="run folder that 'tacit simulate' made")
    report.add_argument("--json", action="store_true", help="print the report as JSON, for programs")
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in verbs:
        raise PlanError(f"expected a verb of tacit, got {argv[0]!r}{nearest(argv[0], tuple(verbs), 'tacit --help')}")
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except SystemExit as done:  # --help and --version print and leave.
        return int(done.code or 0)
    if unknown:
        page = next(iter(kinds.choices[name] for name in verbs if name == arguments.verb))
        flags = tuple(flag for action in page._actions for flag in action.option_strings if flag.startswith("--"))
        word = unknown[0].partition("=")[0]
        hint = nearest(word, flags, f"tacit {arguments.verb} --help")
        raise PlanError(f"expected a flag of tacit {arguments.verb}, got {word!r}{hint}")
    return verbs[arguments.verb](arguments)


def _simulate_page(kinds: Any) -> None:
    from simulations.scenario import GROUPS, KEYS

    page = kinds.add_parser(
        "simulate",
        help="run a federation on this machine",
        description=_SIMULATE,
        epilog=_EXAMPLES,
        formatter_class=_Page,
        usage="tacit simulate [scenario.toml] [flags]",
        allow_abbrev=False,
    )
    page.add_argument("scenario", nargs="?", metavar="scenario.toml", type=Path, help="scenario file")
    for title in GROUPS:
        group = page.add_argument_group(title)
        for key in KEYS:
            if key.group == title:
                group.add_argument(
                    f"--{key.name}",
                    dest=f"key {key.name}",
                    metavar="|".join(key.choices) or key.unit.upper() or _METAVARS[key.kind],
                    default=None,
                    help=_line(key),
                )
    other = page.add_argument_group("this command")
    other.add_argument("--resume", metavar="DIR", type=Path, help="go on with the run in this folder")
    other.add_argument("--app", metavar="DIR", type=Path, help="run the Flower app in this folder instead of a task")
    other.add_argument(
        "--app-config",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="run configuration of --app; repeatable",
    )
    other.add_argument("--json", action="store_true", help="print one JSON object at the end, and nothing else")
    other.add_argument("--quiet", action="store_true", help="print the closing summary only")


def _line(key: Key) -> str:
    """Returns one key's help: its sentence, its range where that is closed, and its default."""
    shown = f"{key.default:g}" if isinstance(key.default, float) else str(key.default)
    facts = [f"0 to {key.most:g}"] if key.most is not None else []
    facts += [f"default {shown}"] if shown else []
    return f"{key.help} ({', '.join(facts)})".replace("%", "%%") if facts else key.help.replace("%", "%%")


def _flags(arguments: argparse.Namespace) -> dict[str, object]:
    """Returns the scenario keys that the command line gives, and no others."""
    return {
        name.removeprefix("key "): value
        for name, value in vars(arguments).items()
        if name.startswith("key ") and value is not None
    }


def _simulate(arguments: argparse.Namespace) -> int:
    from simulations.scenario import Scenario

    if arguments.app is not None:
        return _run_app(arguments)
    if arguments.app_config:
        from privacy.errors import PlanError

        raise PlanError("expected --app-config only with --app DIR, got no --app; a task takes flags instead")
    flags = _flags(arguments)
    if arguments.resume is not None:
        scenario = _resumed(arguments.resume, arguments.scenario, flags)
    else:
        scenario = Scenario.layered(arguments.scenario, flags)
    silent = arguments.json or arguments.quiet
    display = _Silent() if silent else _Display(scenario)
    run = importlib.import_module("simulations.run")
    try:
        with display.shown():
            summary = run.simulate(
                scenario,
                out=Path(scenario.out) if scenario.out and arguments.resume is None else None,
                resume=arguments.resume,
                observer=display,
            )
    except KeyboardInterrupt:
        return _fail(_how_to_go_on(_short(display.run or str(arguments.resume or ""))), 130)
    stopped = str(summary.get("status")) == "interrupted"
    if arguments.json:
        print(json.dumps(_finite(summary), allow_nan=False))
    else:
        _closing(summary)
    if stopped:
        return _fail(_how_to_go_on(_short(str(summary.get("run", "")))), 130)
    return 0


def _how_to_go_on(run: str) -> str:
    if not run:
        return "stopped before the first round; nothing was charged, start it again"
    return f"stopped; what was finished is kept, go on with: tacit simulate --resume {run}"


def _resumed(folder: Path, file: Path | None, flags: Mapping[str, object]) -> Any:
    """Returns the folder's scenario; what is given beside it must agree, except where it runs."""
    import dataclasses

    from privacy.errors import RunError
    from simulations.scenario import BY_NAME, MACHINE, Scenario, read_toml

    scenario = Scenario.from_run(folder)
    given = {**(read_toml(file) if file is not None else {}), **flags}
    moved: dict[str, Any] = {}
    for name, raw in given.items():
        key = BY_NAME[name]
        value, kept = key.read(raw), getattr(scenario, key.field)
        if key.group == MACHINE:
            moved[key.field] = value
        elif value != kept:
            raise RunError(
                f"expected the configuration of {folder}, got {name}={value} where it has {kept}; "
                f"drop {name}, or start a new run without --resume"
            )
    return dataclasses.replace(scenario, **moved)


def _run_app(arguments: argparse.Namespace) -> int:
    from privacy.errors import PlanError
    from simulations.scenario import BY_NAME

    flags = _flags(arguments)
    for name in flags:
        if name not in ("clients", "workers", "threads"):
            raise PlanError(f"expected --app with --clients, --workers and --threads only, got --{name}; drop it")
    for name in ("scenario", "resume"):
        if getattr(arguments, name) is not None:
            raise PlanError(f"expected --app without {name}, got {getattr(arguments, name)}; drop one of them")
    overrides: dict[str, Any] = {}
    for pair in arguments.app_config:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise PlanError(f"expected --app-config KEY=VALUE, got {pair!r}; write for example lr=0.1")
        overrides[name] = _toml(value)
    numbers = {
        name: BY_NAME[name].read(flags.get(name, BY_NAME[name].default)) for name in ("clients", "workers", "threads")
    }
    engine = importlib.import_module("simulations.engine")
    started = time.monotonic()
    engine.run_app(
        arguments.app,
        nodes=numbers["clients"],
        workers=numbers["workers"],
        threads=numbers["threads"],
        overrides=overrides,
    )
    seconds = time.monotonic() - started
    if arguments.json:
        print(json.dumps({"status": "completed", "app": str(arguments.app), "seconds": round(seconds, 3)}))
    elif not arguments.quiet:
        print(f"{arguments.app}: done in {_clock(seconds)}, on {numbers['clients']} nodes of the local engine")
    return 0


def _toml(text: str) -> Any:
    """Reads a value as TOML does, so that 0.1 is a number and true a truth; anything else is text."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _tasks(arguments: argparse.Namespace) -> int:
    from models.task import TASKS

    if arguments.json:
        rows = {
            task.name: {"summary": task.summary, "record": task.record, "defaults": dict(task.defaults)}
            for task in TASKS.values()
        }
        print(json.dumps(rows))
        return 0
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("task", "one record is", "what is learned"):
        table.add_column(title)
    for task in TASKS.values():
        table.add_row(task.name, task.record, task.summary)
    console = _console()
    console.print(table)
    console.print("\nYour own: --task package.module:attribute, where the attribute is a tacit.Task.")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    run = importlib.import_module("simulations.run")
    path = run.render(arguments.run)
    if arguments.json:
        print((path.parent / "report.json").read_text())
    else:
        print(f"wrote {path}\nopen it in a browser: {path.resolve().as_uri()}")
    return 0


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


class _Silent:
    """Watches a run and says nothing; remembers the run folder for the last words."""

    run = ""

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield

    def started(self, info: Mapping[str, object]) -> None:
        self.run = str(info.get("run", ""))

    def round(self, line: Mapping[str, object]) -> None:
        pass

    def finished(self, summary: Mapping[str, object]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Display(_Silent):
    """Shows a run: a live block on a terminal, one line a round elsewhere."""

    def __init__(self, scenario: Any) -> None:
        self.scenario = scenario
        self.console = _console()
        self.line: Mapping[str, Any] = {}
        self.at = time.monotonic()
        self.headline = ""
        self.history: list[float] = []

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        from rich.live import Live

        with Live(self, console=self.console, refresh_per_second=4):
            yield

    def started(self, info: Mapping[str, object]) -> None:
        super().started(info)
        scenario, plan = self.scenario, info.get("plan")
        known: Mapping[str, Any] = plan if isinstance(plan, Mapping) else {}
        cohort = f", {scenario.cohort} asked in a round" if scenario.cohort not in (0, scenario.clients) else ""
        rows = {
            "task": scenario.task,
            "clients": f"{scenario.clients}, {scenario.partition} partition{cohort}",
            "promise": f"epsilon {known.get('epsilon', scenario.epsilon):g} at delta {scenario.delta:g} "
            f"for each client, add or remove {_protected(scenario.unit)}",
        }
        if known and scenario.unit == "client":
            rows |= _central_rows(known)
        elif known:
            spare = known["joins"] - known["rounds"]
            rows["schedule"] = (
                f"{known['rounds']} rounds of {known['steps']} steps; the noise also covers {spare} "
                f"spare charge{'' if spare == 1 else 's'} for retries"
            )
            rows["each step"] = (
                f"a record joins with probability {known['sample_rate']:g}, its gradient is clipped to "
                f"{known['l2_clip']:g}, noise {known['noise_multiplier']:.3g} x clip"
            )
        rows["runs on"] = f"{info.get('engine', scenario.engine)} engine, {info.get('device', scenario.device)}"
        rows["run folder"] = _short(self.run)
        _print_rows(self.console, rows)
        self.console.print()

    def round(self, line: Mapping[str, object]) -> None:
        self.line, self.at = line, time.monotonic()
        metrics = line.get("metrics")
        if isinstance(metrics, Mapping) and metrics:
            self.headline = self.headline or str(next(iter(metrics)))
            if self.headline in metrics:
                self.history.append(float(metrics[self.headline]))
        if not self.console.is_terminal:
            self.console.print("  ".join(self._facts().values()), soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _facts(self) -> dict[str, str]:
        line = self.line
        width = len(str(line["rounds"]))
        headline = (
            f"{self.headline} {_metric(self.headline, self.history[-1])}" if self.history else "not evaluated yet"
        )
        facts = {
            "round": f"round {line['round']:>{width}}/{line['rounds']}",
            "headline": headline,
            "epsilon": f"epsilon {_epsilon(line.get('epsilon'))} of {_epsilon(line.get('budget'))}",
            "replies": f"replies {line.get('replies')}",
        }
        for name in ("declined", "missing"):
            if line.get(name):
                facts[name] = f"{name} {line[name]}"
        left = max(0.0, float(line.get("left_s") or 0.0) - (time.monotonic() - self.at))
        return facts | {
            "seconds": f"{float(line.get('seconds') or 0.0):.2f} s",
            "left": f"{_clock(left)} left",
        }

    def __rich__(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.line:
            return Text("preparing: reading the data, solving for the noise, probing the model ...", style="dim")
        line, facts = self.line, self._facts()
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=22)
        grid.add_column(width=24)
        grid.add_column()
        done = ProgressBar(total=float(line["rounds"]), completed=float(line["round"]), width=24)
        grid.add_row(Text(facts["round"], style="bold"), done, Text(f"{facts['seconds']} a round, {facts['left']}"))
        trend = sparkline(self.history, 24, utf8=self.console.encoding.startswith("utf"))
        others = [facts[name] for name in ("replies", "declined", "missing") if name in facts]
        grid.add_row(Text(facts["headline"], style="bold"), Text(trend, style="cyan"), Text(", ".join(others)))
        spent, budget = line.get("epsilon"), float(line.get("budget") or 0.0)
        share = min(1.0, float(spent) / budget) if spent is not None and math.isfinite(budget) and budget > 0 else 0.0
        purse = ProgressBar(total=1.0, completed=share, width=24, complete_style="yellow", finished_style="yellow")
        grid.add_row(Text(facts["epsilon"], style="bold"), purse, Text("spent of the budget, most-spent client"))
        return grid


def sparkline(values: Sequence[float], width: int, *, utf8: bool = True) -> str:
    """Draws the last ``width`` values as one line of bars, from the smallest to the largest of them."""
    bars = "▁▂▃▄▅▆▇█" if utf8 else "_.-~=+*#"
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(bars[round((value - low) / span * 7) if span else 3] for value in shown)


def _metric(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.4f}"


def _epsilon(value: object) -> str:
    # An unknown epsilon is never shown as a small number (guarantee G6).
    if not isinstance(value, int | float) or math.isnan(value):
        return "unknown"
    # Rounded up, as the report does; the margin forgives what binary fractions add to a round number such as 3.
    return "infinite" if math.isinf(value) else f"{math.ceil(100 * value - 1e-6) / 100:.2f}"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def _short(path: str) -> str:
    """Returns a path as seen from here, where that is shorter."""
    here = os.path.relpath(path) if path else ""
    return here if len(here) < len(path) else path


def _print_rows(console: Console, rows: Mapping[str, object]) -> None:
    """Prints names in bold beside their values; an indented name continues the row above."""
    from rich.text import Text

    width = max(map(len, rows))
    for name, value in rows.items():
        shown = "" if name.startswith(" ") else name
        words = f"{value:.4g}" if isinstance(value, float) else str(value)
        console.print(Text(shown.ljust(width + 2), style="bold") + Text(words, style="not bold"), soft_wrap=True)


def _protected(unit: object) -> str:
    # Where figures differ by who looks, none stands without its adversary (guarantee G16).
    return "the client, against whoever sees who takes part" if unit == "client" else "one record"


def _central_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a plan that protects clients does, for the screen."""
    spare = plan["joins"] - plan["turns"]
    follows = f", then follows the quantile {plan['quantile']:g} of them" if plan["quantile"] else ""
    return {
        "schedule": f"{plan['rounds']} rounds; a client takes part with probability {plan['client_rate']:g} and in "
        f"{plan['turns']} at most; the noise also covers {spare} spare charge{'' if spare == 1 else 's'} for retries",
        "each round": f"an update of {plan['steps']} plain steps is clipped to {plan['l2_clip']:g}{follows}; the "
        f"server adds noise {plan['noise_multiplier']:.3g} x clip to the sum, divides by {plan['expected_batch']:g}",
        "trusts": "the server, which sees each client's update: against it there is no guarantee",
    }


def _closing(summary: Mapping[str, object]) -> None:
    from rich.text import Text

    delta, seconds, metrics = (summary.get(name) for name in ("delta", "seconds", "metrics"))
    at = f"at delta {delta:g}" if isinstance(delta, float) else "at an unknown delta"
    rows: dict[str, object] = {}
    for name, value in (metrics if isinstance(metrics, Mapping) else {}).items():
        rows[str(name)] = _metric(str(name), float(value))
    unit = summary.get("unit")
    rows["epsilon"] = f"{_epsilon(summary.get('epsilon'))} {at} for each client, add or remove {_protected(unit)}"
    # Where group privacy gives the figure, it holds at a larger delta.
    swap = summary.get("delta_replace_one")
    swap_at = f"at delta {swap:.3g}" if isinstance(swap, float) else at
    swapped = _epsilon(summary.get("epsilon_replace_one"))
    rows[" replace"] = f"{swapped} {swap_at} for each client, replace {_protected(unit)}"
    if unit == "client":
        rows[" server"] = "infinite against the server, which saw each update and added the noise"
    if isinstance(seconds, int | float):
        rows["time"] = f"{_clock(float(seconds))}, {summary.get('rounds')} rounds"
    spent, budget = summary.get("epsilon_spent"), summary.get("budget")
    if spent is not None and budget is not None:
        # Two true figures: the filter holds whatever the ledger sees next, the headline for this schedule.
        rows["ledgers"] = f"{_epsilon(spent)} of {_epsilon(budget)} spent, counted by the filter that guards the budget"
    if summary.get("run"):
        rows["run folder"] = _short(str(summary["run"]))
    console = _console()
    console.print()
    console.print(Text(f"{str(summary.get('status', 'done')).replace('_', ' ').capitalize()}.", style="bold green"))
    _print_rows(console, rows)
    if summary.get("report"):
        address = Path(str(summary["report"])).resolve().as_uri()
        console.print(f"\nOpen the report in a browser: {address}", soft_wrap=True)


def _finite(value: object) -> object:
    """Returns a value that JSON can hold: infinity and NaN become the words a report uses, paths text."""
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "unknown" if math.isnan(value) else "infinity"
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _leave(code: int) -> NoReturn:
    """Ends the process at once.

    Everything is on disk and every worker has ended by now. Taking PyTorch and its friends apart module by module, as
    Python does at exit, would only keep a person waiting for another second.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
