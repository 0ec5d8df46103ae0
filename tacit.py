"""The front door: the ``tacit`` command, and the few names that a user imports.

Everything heavy is imported where it is used, so that ``tacit --help`` and ``import tacit`` take a fraction
of a second: neither PyTorch nor Flower nor Opacus is loaded before a job starts.

Exit codes: 0 done, 1 unexpected, 2 bad plan or flag, 3 bad data, 4 bad ledger, 5 budget exceeded, 6 run
folder, engine or disk, 7 an audit contradicts a promise, 8 a sealed file or its keys, 9 a sealed message, 10 an
invitation, key or certificate is refused, 130 stopped with Ctrl-C (and resumable).
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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


_VERIFY: Final = """\
Check what a run or a data holder left, trusting nobody who made it: hashes, signatures, chains, receipts against
ledgers, and every epsilon computed anew, by a second accountant too. Needs the files and nothing else. Ends with 0
only if nothing failed; what cannot be proven is said, and does not fail.
"""

_INFER: Final = """\
Ask a trained model about a record without showing it: the record, its features and the answer stay with the client, the
server computes on ciphertexts and holds no key. For models that end in one linear layer over fixed features.
"""

_CLIENT: Final = """\
What a data holder does: join a federation, take part, say what jobs may use its data, and keep its own ledger, out of
any job's reach. A budget is set once for a data set's lifetime; afterwards it can be lowered, and raised only by an
explicit word that every report shows.
"""

_SERVER: Final = """\
Make and run what clients on other machines join: an authority for certificates, a list of members, and an endpoint
where they redeem invitations. No file is carried to a client; an invitation is one line of text.
"""

_JOIN: Final = """\
Join a federation with the one line that its operator sent. Keys are made here and never leave this machine; the budget
is yours to set, whatever the invitation asks for. Data, disk, versions and permissions are looked at first, so that a
fault costs no invitation; the server, clocks and certificates afterwards.
"""

_VAULT: Final = """\
Seal files and folders, so that who copies or finds them learns nothing; a data set that is sealed is trained on as it
is. Passphrases are asked for, or come from --passphrase-file, TACIT_VAULT_PASSPHRASE_FILE or TACIT_VAULT_PASSPHRASE;
keys come from --keys or TACIT_VAULT_KEYS.
"""

_VAULT_EXAMPLES: Final = """\
examples:
  tacit vault keygen keys                       a keyring, sealed if a passphrase is given
  tacit vault encrypt clinic --keys keys        the folder clinic as one file, clinic.sealed
  tacit vault decrypt clinic.sealed --keys keys
  tacit vault rotate . --keys keys --new-key    a new key for every sealed file below; started again, it goes on
  tacit vault inspect clinic.sealed             what it is, and for which keys
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

    verbs = {
        "simulate": _simulate,
        "plan": _plan,
        "tune": _tune,
        "report": _report,
        "verify": _verify,
        "audit": _audit,
        "generate": _generate,
        "client": _client,
        "server": _server,
        "vault": _vault,
        "infer": _infer,
        "recommend": _recommend,
        "play": _play,
        "tasks": _tasks,
    }
    parser = _Parser(prog="tacit", description=_ABOUT, formatter_class=_Page, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tacit {__version__}")
    kinds = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", parser_class=_Parser)
    _simulate_page(kinds)
    _plan_page(kinds)
    _tune_page(kinds)
    _report_page(kinds)
    _verify_page(kinds)
    _audit_page(kinds)
    _generate_page(kinds)
    _client_page(kinds)
    _server_page(kinds)
    _vault_page(kinds)
    _infer_page(kinds)
    _recommend_page(kinds)
    _play_page(kinds)
    tasks = kinds.add_parser("tasks", help="what can be trained, on which data", formatter_class=_Page)
    tasks.add_argument("--json", action="store_true", help="one JSON object, for programs")
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
    from simulations.scenario import GROUPS

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
    _keys(page, GROUPS)
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


def _keys(page: Any, groups: Sequence[str]) -> None:
    """Adds a flag for every scenario key of some groups."""
    from simulations.scenario import KEYS

    for title in groups:
        group = page.add_argument_group(title)
        for key in KEYS:
            if key.group == title:
                metavar = "|".join(key.choices) or key.unit.upper() or _METAVARS[key.kind]
                group.add_argument(
                    f"--{key.name}", dest=f"key {key.name}", metavar=metavar, default=None, help=_line(key)
                )


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
    if flags.get("vault"):
        # A run may be resumed from another folder.
        flags["vault"] = str(Path(str(flags["vault"])).expanduser().resolve())
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


_PLAN: Final = """\
Say what a job would cost and how much noise it would carry, without touching any data: from epsilon, rounds and
sizes to the noise, or with --noise-multiplier from the noise to epsilon. It takes the keys of tacit simulate, and
a run of the same keys charges what is printed here.
"""

_PLAN_EXAMPLES: Final = """\
examples:
  tacit plan                                            the default job
  tacit plan --task table --records-per-client 400 --clients 20 --epsilon 2
  tacit plan --noise-multiplier 1.1                     the other way round
  tacit plan hospital.toml --plot plan.svg              a scenario file, and a picture of both sweeps
  tacit plan hospital.toml --ledgers ledgers/           how many more such jobs each ledger affords
"""


def _plan_page(kinds: Any) -> None:
    from simulations.scenario import FOLDERS, GROUPS, MACHINE

    page = kinds.add_parser(
        "plan",
        help="what a job would cost, before it runs",
        description=_PLAN,
        epilog=_PLAN_EXAMPLES,
        formatter_class=_Page,
        usage="tacit plan [scenario.toml] [flags]",
        allow_abbrev=False,
    )
    page.add_argument("scenario", nargs="?", metavar="scenario.toml", type=Path, help="scenario file")
    _keys(page, tuple(title for title in GROUPS if title not in (MACHINE, FOLDERS)))
    other = page.add_argument_group("this command")
    other.add_argument("--ledgers", metavar="DIR", type=Path, help="say what the ledgers there have left; only reads")
    other.add_argument("--plot", metavar="FILE", type=Path, help="draw both sweeps into an SVG file")
    other.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")


def _plan(arguments: argparse.Namespace) -> int:
    from simulations.scenario import Scenario

    scenario = Scenario.layered(arguments.scenario, _flags(arguments))
    planning = importlib.import_module("simulations.planning")
    ledgers = arguments.ledgers
    shared = Path(scenario.ledgers).expanduser()
    if ledgers is None and scenario.ledgers and (shared / "ledger.jsonl").is_file():
        ledgers = shared
    facts = planning.plan(scenario, ledgers=ledgers)
    if arguments.plot is not None:
        from privacy.files import write_whole

        write_whole(arguments.plot, planning.picture(facts).encode())
    if arguments.json:
        print(json.dumps(_finite(facts), allow_nan=False))
        return 0
    console = _console()
    _plan_rows(console, facts)
    _sweeps(console, facts, planning.bar)
    if "ledgers" in facts:
        _what_is_left(console, facts["ledgers"], facts["schedule"])
    if arguments.plot is not None:
        console.print(f"\nwrote {arguments.plot}", soft_wrap=True)
    return 0


def _replaced(cost: Mapping[str, Any], unit: str) -> str:
    """Says what replacing one of a unit costs, by two accountants."""
    second = f"{_epsilon(cost['replace_one_second'])} by another accountant ({cost['replace_one_note']})"
    return f"{_epsilon(cost['replace_one'])} to replace one {unit}, by PLD; {second}"


def _plan_rows(console: Console, facts: Mapping[str, Any]) -> None:
    """Prints a plan as names and values."""
    plan, schedule, cost, signal = (facts[name] for name in ("plan", "schedule", "cost", "signal"))
    spare = schedule["spare"]
    asked = f"{facts['cohort']} of {facts['clients']} clients in a round" if facts["cohort"] < facts["clients"] else ""
    rows: dict[str, object] = {
        "task": f"{facts['task']}; one record is {facts['record']}",
        "clients": f"{facts['clients']}, {schedule['records_per_client']:,} records each by declaration"
        + (f"; {asked}" if asked else ""),
        "schedule": f"{plan['rounds']} rounds of {plan['steps']} steps; a client joins {schedule['joins']} of them and "
        f"pays for {spare} spare charge{'' if spare == 1 else 's'} for retries: {schedule['steps']:,} steps in all",
        "sampling": f"each record joins a step with probability {plan['sample_rate']:g}; expected batch "
        f"{plan['expected_batch']:g}, which is the divisor",
        "clip": f"{plan['l2_clip']:g}, the most that one record's gradient may measure",
        "noise": f"{plan['noise_multiplier']:.4g} x clip" + ("" if facts["solved"] == "epsilon" else ", solved for"),
        "epsilon": f"{_epsilon(cost['filter']['epsilon'])} at delta {plan['delta']:g}, by the RDP filter that guards "
        "the ledgers" + (", follows from the noise" if facts["solved"] == "epsilon" else ""),
        " pld": f"{_epsilon(cost['pld'])} by PLD, for exactly this schedule and all of it",
        " prv": f"{_epsilon(cost['prv'])} by PRV, a cross-check ({cost['prv_note']})",
        " replace": _replaced(cost, "record"),
    }
    if plan.get("unit") == "client":
        # In the same order as above: what is indented goes on with the row before it.
        names = {"sampling": "each round", "clip": "trusts"}
        known = _central_rows(plan) | {" replace": _replaced(cost, "client")}
        rows = {names.get(name, name): known.get(names.get(name, name), words) for name, words in rows.items()}
    for item in cost["at_deltas"][1:]:
        rows[f" at {item['delta']:g}"] = f"{_epsilon(item['epsilon'])} at delta {item['delta']:g}, by PLD"
    for item in cost["persons"][1:]:
        rows[f" of {item['records']}"] = (
            f"{_epsilon(item['epsilon'])} for a person with up to {item['records']} records at a client"
        )
    many = cost["federation"]
    if many["multiplicity"] > 1:
        rows[" of many"] = f"{_epsilon(many['epsilon'])} for a person with a record at {many['multiplicity']} clients"
    if cost["zcdp_rho"] is not None:
        rows[" also"] = f"rho {cost['zcdp_rho']:.4g} in zCDP, mu {cost['gdp_mu']:.4g} in Gaussian DP (no sampling)"
    odds = cost["odds"]
    shown = "without bound" if math.isinf(odds) else f"{_up(odds)} times"
    who = (
        "a client"
        if plan.get("unit") == "client"
        else "a record"
        if many["multiplicity"] == 1
        else f"a person of {many['multiplicity']} clients"
    )
    rows["attacker"] = f"odds that {who} was there grow by {shown} at most, but for delta"
    for item in cost["tpr"]:
        rows[f" {item['fpr']:g}"] = (
            f"finds {_up(100 * item['tpr'])} % of members at most where it accuses {100 * item['fpr']:g} % of others"
        )
    rows["signal"] = _signal(signal)
    if "noise_of_the_sum" in signal:
        rows[" model"] = (
            f"noise of {signal['noise_of_the_sum']:.3g} on each parameter of the sum of all rounds, which is the "
            f"model; {signal['noise_of_the_sum_if_fresh']:.3g} if it were fresh in every round"
        )
    rows[" as"] = f"{signal['formula']}; P parameters, B expected batch, n updates in the mean"
    rows[" assumes"] = signal["assumes"]
    _print_rows(console, rows)


def _signal(signal: Mapping[str, Any]) -> str:
    if signal["noise_norm"] is None:
        return (
            f"noise of {signal['noise_per_parameter']:.3g} on each parameter of the mean; its norm is unknown, because "
            "nobody published the shape of these records (name the data)"
        )
    return (
        f"noise of norm {signal['noise_norm']:.3g} on the mean of a step ({signal['noise_per_parameter']:.3g} on each "
        f"of {signal['parameters']:,} parameters) beside a signal of {signal['clip']:g} at most: "
        f"{signal['ratio_of_a_step']:.3g} to 1, and {signal['ratio_of_a_round']:.3g} to 1 over a round"
    )


def _up(value: float) -> str:
    """Returns a bound in three digits, rounded up."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 1e-9) * unit:.3g}"


def _sweeps(console: Console, facts: Mapping[str, Any], bar: Any) -> None:
    """Prints both sweeps as tables with a small plot in their last column."""
    from rich.table import Table

    utf8, sweeps = console.encoding.startswith("utf"), facts["sweeps"]
    for title, name, drawn in (
        ("other numbers of rounds, the same noise", "rounds", "epsilon"),
        ("other budgets, the same rounds", "epsilon", "noise_multiplier"),
    ):
        rows = sweeps[name]
        most = max((row[drawn] for row in rows if math.isfinite(row[drawn])), default=0.0)
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title=title, title_justify="left")
        for head in ("rounds", "noise", "epsilon", "by PLD", "signal"):
            table.add_column(head, justify="right")
        table.add_column("noise" if drawn == "noise_multiplier" else drawn)
        for row in rows:
            ratio = row["ratio_of_a_round"]
            table.add_row(
                str(row["rounds"]),
                f"{row['noise_multiplier']:.4g}",
                _epsilon(row["epsilon"]),
                _epsilon(row["pld"]),
                "unknown" if ratio is None else f"{ratio:.3g}",
                bar(row[drawn], most, 30, utf8=utf8),
            )
        console.print()
        console.print(table)


def _what_is_left(console: Console, ledgers: Sequence[Mapping[str, Any]], schedule: Mapping[str, Any]) -> None:
    """Prints what ledgers have spent, what is left, and how much of this plan that affords."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title="what is left", title_justify="left")
    for head in ("ledger", "budget", "spent", "remaining", "runs", "rounds"):
        table.add_column(head, justify="left" if head == "ledger" else "right")
    for row in ledgers[:40]:
        left = math.floor(100 * row["remaining"] + 1e-6) / 100
        table.add_row(
            row["name"],
            _epsilon(row["epsilon"]),
            _epsilon(row["spent"]),
            f"{left:.2f}",
            f"{row['runs']:,}",
            f"{row['rounds']:,}",
        )
    console.print()
    console.print(table)
    if len(ledgers) > 40:
        console.print(f"... and {len(ledgers) - 40:,} more; --json prints all")
    runs = min((row["runs"] for row in ledgers), default=0)
    console.print(
        f"Every ledger affords {runs:,} more such job{'' if runs == 1 else 's'}, spare charges included "
        f"({schedule['spare']} each); spent is counted by the filter at the holder's delta.",
        soft_wrap=True,
    )


_TUNE: Final = """\
Search for hyper-parameters. Every candidate's updates leave the clients, so every candidate is charged in full:
--epsilon is the budget of the whole search, the final model included, and it is split evenly over the candidates
before the first of them runs. On public or synthetic data (--public) nothing is charged. The final model is the
winner's.
"""

_TUNE_EXAMPLES: Final = """\
examples:
  tacit tune --try lr=0.5,1,2 --try l2-clip=0.5,1       a grid of six, together within epsilon 3
  tacit tune --try lr=0.5,1,2 --public                  on data that is public: costs nothing, and says why
  tacit tune hospital.toml --try lr=0.5,1,2,4 --candidates 2 --ledgers ledgers/
  tacit tune --list candidates.toml --dry-run           what the search would cost; nothing is charged
  tacit tune --resume runs/FOLDER                       go on after Ctrl-C or a crash

list of candidates: [[candidate]] tables of scenario keys.
"""


def _tune_page(kinds: Any) -> None:
    from simulations.scenario import GROUPS

    page = kinds.add_parser(
        "tune",
        help="search for hyper-parameters, and charge the whole search",
        description=_TUNE,
        epilog=_TUNE_EXAMPLES,
        formatter_class=_Page,
        usage="tacit tune [scenario.toml] --try KEY=VALUE,VALUE [flags]",
        allow_abbrev=False,
    )
    page.add_argument("scenario", nargs="?", metavar="scenario.toml", type=Path, help="what all candidates share")
    search = page.add_argument_group("the search")
    search.add_argument(
        "--try",
        dest="tries",
        metavar="KEY=VALUE,VALUE",
        action="append",
        default=[],
        help="values of one scenario key; repeatable, all combinations are candidates",
    )
    search.add_argument("--list", metavar="FILE", type=Path, help="a TOML list of candidates instead")
    search.add_argument(
        "--candidates", metavar="N", type=int, default=0, help="a random N of them, drawn with --seed (default all)"
    )
    search.add_argument("--metric", metavar="NAME", default="", help="what to choose by (default: the task's first)")
    search.add_argument(
        "--validation",
        metavar="X",
        type=float,
        default=0.5,
        help="share of the server's public test set to choose on; the winner is reported on the rest (default 0.5; "
        "0 = choose on all of it, which flatters the winner)",
    )
    search.add_argument("--public", action="store_true", help="the data is public or synthetic: nothing is charged")
    search.add_argument(
        "--public-because", metavar="TEXT", default="", help="why it is, where the task does not say; it is recorded"
    )
    search.add_argument("--dry-run", action="store_true", help="print what the search would cost, and stop")
    search.add_argument("--resume", metavar="DIR", type=Path, help="go on with the search in this folder")
    search.add_argument("--json", action="store_true", help="print one JSON object at the end, and nothing else")
    _keys(page, GROUPS)


def _tune(arguments: argparse.Namespace) -> int:
    from privacy.errors import PlanError
    from simulations.scenario import Scenario

    flags = _flags(arguments)
    given = [*flags, *(["try"] if arguments.tries else []), *(["list"] if arguments.list else [])]
    given += ["scenario.toml"] if arguments.scenario else []
    if arguments.resume is not None and given:
        raise PlanError(
            f"expected --resume alone, got {given[0]} beside it; what a search tries is settled at its start"
        )
    if arguments.list is not None and arguments.tries:
        raise PlanError("expected --try or --list, got both; drop one")
    tune = importlib.import_module("simulations.tune")
    watcher = _SearchDisplay(_console(), tune, silent=arguments.json)
    folder = arguments.resume
    try:
        if arguments.resume is not None:
            search = tune.resume(folder, watcher)
        else:
            out = flags.pop("out", "")
            candidates = tune.listed(arguments.list) if arguments.list is not None else tune.grid(arguments.tries)
            seed = Scenario.layered(arguments.scenario, flags).seed
            search = tune.prepare(
                arguments.scenario,
                flags,
                tune.drawn(candidates, arguments.candidates, seed),
                public=arguments.public,
                statement=arguments.public_because,
                metric=arguments.metric,
                validation=arguments.validation,
            )
            if arguments.dry_run:
                watcher.planned(search)
                if arguments.json:
                    print(json.dumps(_finite(search), allow_nan=False))
                return 0
            folder = Path(str(out)) if out else _search_folder(search["task"])
            search = tune.run(search, folder, watcher)
    except KeyboardInterrupt:
        return _fail(f"stopped; what was finished is kept, go on with: tacit tune --resume {folder}", 130)
    if arguments.json:
        print(json.dumps(_finite(search), allow_nan=False))
    else:
        watcher.closing(search, folder)
    if search["status"] == "interrupted":
        return _fail(f"stopped; what was finished is kept, go on with: tacit tune --resume {folder}", 130)
    return 0


def _search_folder(task: str) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in task)
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-tune-{name}"


class _SearchDisplay:
    """Shows a search: its price before the first candidate, then a line a candidate."""

    def __init__(self, console: Console, tune: Any, *, silent: bool) -> None:
        self.console, self.tune, self.silent = console, tune, silent

    def note(self, text: str) -> None:
        if not self.silent:
            self.console.print(text, soft_wrap=True)

    def planned(self, search: Mapping[str, Any]) -> None:
        if self.silent:
            return
        price, count = search["price"], len(search["candidates"])
        rows = {"task": search["task"], "candidates": f"{count}, on {search['clients']} clients"}
        if search["public"] is not None:
            rows["cost"] = f"none: {search['public']['why']}; no budget is charged"
        else:
            alone = max(candidate["epsilon"] for candidate in search["candidates"])
            rows["cost"] = (
                f"epsilon {_epsilon(price['epsilon'])} at delta {search['delta']:g} for each client, for all {count} "
                "candidates, each charged in full, by the RDP filter that guards the ledgers"
            )
            rows[" pld"] = f"{_epsilon(price['pld'])} by PLD, for exactly this search and all of it"
            rows[" replace"] = f"{_epsilon(price['replace_one'])} to replace one record, by PLD"
            if search["multiplicity"] > 1:
                rows[" of many"] = f"{_epsilon(price['person'])} for a person at {search['multiplicity']} clients"
            rows[" one"] = f"{_epsilon(alone)} at most for one candidate alone, which is not what a search costs"
        share = search["validation"]
        on = f"{100 * share:g} % of the server's public test set" if share else "the whole test set, which flatters"
        rows["chosen by"] = f"{search['metric']} on {on}"
        _print_rows(self.console, rows)
        self.console.print()

    def candidate(self, search: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
        if self.silent:
            return
        result, metric = candidate["result"], search["metric"]
        settings = "  ".join(f"{name}={value}" for name, value in candidate["settings"].items())
        self.console.print(
            f"candidate {candidate['number']}/{len(search['candidates'])}  {settings}  noise "
            f"{candidate['noise_multiplier']:.4g}  {metric} {self.tune.figure(result['metrics'][metric])}  "
            f"{_clock(float(result['seconds']))}",
            soft_wrap=True,
        )

    def closing(self, search: Mapping[str, Any], folder: Path) -> None:
        from rich.table import Table

        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for head in ("", "settings", search["metric"], "noise", "charged alone"):
            table.add_column(head, justify="left" if head in ("", "settings") else "right")
        charged = search["total"].get("charged", {})
        for candidate in search["candidates"]:
            result, number = candidate["result"], candidate["number"]
            table.add_row(
                "winner" if number == search["winner"] else str(number),
                ", ".join(f"{name} {value}" for name, value in candidate["settings"].items()),
                "not run" if result is None else self.tune.figure(result["metrics"][search["metric"]]),
                f"{candidate['noise_multiplier']:.4g}",
                "nothing" if search["public"] is not None else _epsilon(charged.get(str(number))),
            )
        self.console.print()
        self.console.print(table)
        total = search["total"]
        self.console.print()
        if search["public"] is None:
            self.console.print(
                f"The whole search cost epsilon {_epsilon(total['epsilon'])} at delta {search['delta']:g} for each "
                f"client: {total['basis']}. What the candidates cost alone does not add up to it.",
                soft_wrap=True,
            )
        else:
            self.console.print(f"It cost no privacy: {total['basis']}.", soft_wrap=True)
        for line in self.tune.judgement(search):
            self.console.print(line, soft_wrap=True)
        self.console.print(f"search folder  {_short(str(folder.resolve()))}", soft_wrap=True)


_AUDIT: Final = """\
Try to contradict what is promised: probe the clipping, the noise, the sampling and the ledger, and attack the training
itself with canaries, in a low-epsilon configuration of the same code. Runs on synthetic records and charges nothing.
With a run folder: under that run's plan, its ledgers are priced again, and the bounds are left there for its report.
Ends with exit code 7 if anything is contradicted.
"""


def _audit_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "audit",
        help="try to contradict what is promised, by probes and attacks",
        description=_AUDIT,
        formatter_class=_Page,
        allow_abbrev=False,
    )
    page.add_argument("run", nargs="?", metavar="RUN", type=Path, help="run folder that 'tacit simulate' made")
    page.add_argument("--task", metavar="TEXT", help="audit this task under its defaults (default digits)")
    page.add_argument(
        "--data", metavar="PATH", default="", help="where the data of --task lies; only its shape is used"
    )
    page.add_argument("--epsilon", metavar="X", type=float, default=2.0, help="epsilon to audit at (default 2)")
    page.add_argument("--canaries", metavar="N", type=int, default=1000, help="gradient canaries (default 1000)")
    page.add_argument(
        "--membership", action="store_true", help="attack trained models by membership inference too; it stays here"
    )
    page.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _audit(arguments: argparse.Namespace) -> int:
    from privacy.errors import PlanError

    if arguments.run is not None and (arguments.task or arguments.data):
        raise PlanError("expected a run folder or --task, got both; a run has its own task")
    run = importlib.import_module("simulations.audit").audit
    console = _console()
    with _AuditDisplay(console, quiet=arguments.json).shown() as display:
        result = run(
            arguments.run,
            task=arguments.task or "digits",
            data=arguments.data,
            epsilon=arguments.epsilon,
            canaries=arguments.canaries,
            membership=arguments.membership,
            on_finding=display.tell,
        )
    if arguments.json:
        print(json.dumps(_finite(result), allow_nan=False))
    else:
        _audit_closing(console, result)
    return 0 if result["holds"] else 7


class _AuditDisplay:
    """One line an audit, as it ends; on a terminal also which one is running."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console, self._quiet, self._began = console, quiet, 0.0
        self._status: Any = None

    @contextmanager
    def shown(self) -> Iterator[_AuditDisplay]:
        if self._quiet or not self._console.is_terminal:
            yield self
            return
        with self._console.status("preparing: solving for the noise, probing the model ...") as self._status:
            yield self

    def tell(self, name: str, finding: Any) -> None:
        if self._quiet:
            return
        if finding is None:
            self._began = time.monotonic()
            if self._status is not None:
                self._status.update(f"{name} ...")
            return
        from rich.text import Text

        word = finding.word
        style = {"holds": "green", "FAILS": "bold red"}.get(word, "yellow")
        line = Text(f"{name:<32}", style="bold") + Text(f"{word}  ", style=style) + Text(finding.line, style="not bold")
        self._console.print(line + Text(f"  {_clock(time.monotonic() - self._began)}", style="dim"), soft_wrap=True)


def _audit_closing(console: Console, result: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("epsilon", "below", "above", "m", "r", "v", "confidence", "ceiling"):
        table.add_column(title, no_wrap=True)
    rows = [row for row in result["evidence"]["bounds"] if "epsilon_lower" in row]
    for row in rows:
        table.add_row(
            row["audit"],
            # From below rounded down, from above rounded up.
            f"{math.floor(100 * row['epsilon_lower']) / 100:.2f}",
            _epsilon(row["epsilon_upper"]),
            *(str(row[name]) for name in ("canaries", "guesses", "correct")),
            f"{100 * row['confidence']:g} %",
            f"{row['ceiling']:.2f}",
        )
    if rows:
        console.print()
        console.print(table)
        console.print()
        for row in rows:
            console.print(f"{row['audit']} ({row['schedule']}): the attacker {row['threat_model']}.", soft_wrap=True)
        console.print(
            f"At delta {rows[0]['delta']:g}, add or remove one record; m canaries, r guesses, v of them right. A claim "
            "above the ceiling could not be contradicted: a low-epsilon configuration of the same code is audited.",
            soft_wrap=True,
        )
    for note in result["notes"]:
        console.print(note, soft_wrap=True)
    failed = [finding["audit"] for finding in result["findings"] if not finding["holds"]]
    words = f"Contradicted by: {', '.join(failed)}." if failed else "Nothing contradicts what is promised."
    if any(finding["estimate"] for finding in result["findings"]):
        words += " Estimates had no part in that."
    console.print(Text(f"\n{words}", style="bold red" if failed else "bold green"), soft_wrap=True)
    attacked = any(finding["audit"] == "membership inference" for finding in result["findings"])
    records = "synthetic records" + (
        ", for membership inference public ones where the task has any" if attacked else ""
    )
    console.print(f"{_clock(result['seconds'])}, on {records}; nothing was charged", soft_wrap=True)
    if result["run"] is not None and rows:
        console.print(f"wrote {_short(str(Path(result['run']).resolve() / 'audit.json'))}", soft_wrap=True)


def _generate_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "generate",
        help="write text with a run's language model",
        description="Writes text with the model of a run, such as one of task shakespeare-lstm. It costs no privacy.",
        formatter_class=_Page,
        allow_abbrev=False,
    )
    page.add_argument("run", metavar="RUN", type=Path, help="run folder of a task that writes text")
    page.add_argument("--prompt", metavar="TEXT", default="\n", help="what the text begins with (default a line break)")
    page.add_argument("--length", metavar="N", type=int, default=400, help="how many tokens to write (default 400)")
    page.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.8,
        help="1 draws as the model predicts, less is bolder, 0 takes the likeliest (default 0.8)",
    )
    page.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed gives the same text (default 0)")
    page.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _generate(arguments: argparse.Namespace) -> int:
    from simulations.generate import generate

    asked = {name: getattr(arguments, name) for name in ("prompt", "length", "temperature", "seed")}
    text = generate(arguments.run, **asked)
    print(json.dumps({"run": str(arguments.run), **asked, "text": text}) if arguments.json else arguments.prompt + text)
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from models.catalog import TASKS

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


def _report_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "report", help="write a run's report again, or one over ledgers", formatter_class=_Page, allow_abbrev=False
    )
    page.add_argument("places", metavar="RUN|LEDGER", type=Path, nargs="+", help="a run folder, or ledgers or exports")
    page.add_argument("--out", metavar="DIR", type=Path, help="where to write a report over ledgers (default: here)")
    page.add_argument(
        "--home", metavar="DIR", type=Path, help="the server's folder, for a run on machines (default ~/.tacit/server)"
    )
    page.add_argument(
        "--records-per-person",
        metavar="N",
        type=int,
        action="append",
        default=[],
        help="price a person with up to N records in one data set too; repeatable, each takes up to a minute",
    )
    page.add_argument("--json", action="store_true", help="print the report as JSON, for programs")


def _report(arguments: argparse.Namespace) -> int:
    persons = tuple(arguments.records_per_person)
    place = arguments.places[0]
    if len(arguments.places) == 1 and (place / "members.json").exists() and (place / "job.json").exists():
        from server.home import ServerHome
        from simulations.deployment import render_deployed

        path = render_deployed(place, ServerHome.open(_server_folder(arguments)), persons)
    elif len(arguments.places) == 1 and not _is_ledger_place(place):
        run = importlib.import_module("simulations.run")
        path = run.render(arguments.places[0], *([persons] if persons else []))
    else:
        from privacy.ledger_report import write_over_ledgers

        path = write_over_ledgers(arguments.places, arguments.out or Path())
    if arguments.json:
        print((path.parent / "report.json").read_text())
    else:
        print(f"wrote {path}\nopen it in a browser: {path.resolve().as_uri()}")
    return 0


def _is_ledger_place(place: Path) -> bool:
    """Whether a place is a ledger, an export, or a folder with a ledger in it, rather than a run folder."""
    return place.is_file() or (place / "ledger.jsonl").exists()


def _verify_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "verify",
        help="check reports, receipts and ledgers from the files alone",
        description=_VERIFY,
        formatter_class=_Page,
        allow_abbrev=False,
    )
    page.add_argument(
        "places",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="report.json, report.html, receipts.jsonl, ledger.jsonl, an export, or a folder with such",
    )
    page.add_argument(
        "--key",
        metavar="HEX",
        action="append",
        default=[],
        help="public key that you trust (64 hex digits); repeatable",
    )
    page.add_argument("--keys", metavar="FILE", type=Path, help="file with such keys, the first word of each line")
    page.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _verify(arguments: argparse.Namespace) -> int:
    from privacy.errors import LedgerError
    from privacy.verify import passed, verify_files

    checks = verify_files(arguments.places, _trusted(arguments))
    sound = passed(checks)
    if arguments.json:
        rows = [{"check": check.name, "result": check.result.value, "words": check.words} for check in checks]
        print(json.dumps({"holds": sound, "checks": rows}))
    else:
        from rich.text import Text

        colors = {"holds": "green", "does not hold": "bold red", "cannot be proven": "yellow"}
        console = _console()
        for check in checks:
            answer = Text(check.result.value.ljust(18), style=colors[check.result.value])
            console.print(answer + Text(f"{check.name}: {check.words}", style="not bold"), soft_wrap=True)
        failed = sum(check.result.value == "does not hold" for check in checks)
        verdict = "Nothing failed." if sound else f"{failed} of {len(checks)} checks do not hold."
        console.print(f"\n{verdict}", style="bold")
    return 0 if sound else LedgerError.exit_code


def _trusted(arguments: argparse.Namespace) -> list[str]:
    """Returns the keys that the command line names.

    Raises:
        PlanError: One is no key: a typing error must not pass for a key that nobody uses.
    """
    import re

    from privacy.errors import PlanError

    keys = list(arguments.key)
    if arguments.keys is not None:
        lines = arguments.keys.read_text().splitlines()
        keys += [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    for key in keys:
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise PlanError(f"expected a public key of 64 lower-case hex digits, got {key[:70]!r}; copy it whole")
    return keys


def _client_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "client",
        help="a data holder: join, take part, decide about jobs; its own ledger and budget",
        description=_CLIENT,
        formatter_class=_Page,
        allow_abbrev=False,
    )
    acts = page.add_subparsers(title="verbs", dest="act", metavar="VERB", required=True, parser_class=_Parser)
    for name, text in (
        ("ledger", "show what was spent, on what, and what is left"),
        ("budget", "set a data set's lifetime budget, lower it, or (with --raise) raise it"),
    ):
        act = acts.add_parser(name, help=text, description=text, formatter_class=_Page, allow_abbrev=False)
        act.add_argument(
            "folder", nargs="?", metavar="DIR", type=Path, help="folder of the ledger (default: of ~/.tacit/client)"
        )
        act.add_argument(
            "--population", metavar="TEXT", help="whose accounts, where the ledger holds several populations"
        )
        act.add_argument("--json", action="store_true", help="one JSON object, for programs")
        if name == "budget":
            act.add_argument("--name", metavar="NAME", help="the data set; without it, the budgets are shown")
            act.add_argument("--epsilon", metavar="X", type=float, help="most that may ever be spent")
            act.add_argument("--delta", metavar="X", type=float, help="at which all spend is priced; fixed for ever")
            act.add_argument("--records-bound", metavar="N", type=int, help="public bound on the number of records")
            act.add_argument(
                "--order", metavar="X", type=float, default=0.0, help="Renyi order of the filter (0: chosen)"
            )
            act.add_argument(
                "--raise", dest="may_raise", action="store_true", help="let the budget grow; reports show it"
            )
    for name, text, places in (
        ("export", "write a signed copy of a ledger, without its secret", ("DIR", "FILE")),
        ("import", "continue a ledger from a copy of itself; nothing is ever taken back", ("FILE", "DIR")),
    ):
        act = acts.add_parser(name, help=text, description=text, formatter_class=_Page, allow_abbrev=False)
        for place in places:
            act.add_argument(
                place.lower(), metavar=place, type=Path, help=f"the {'copy' if place == 'FILE' else 'ledger'}"
            )
        act.add_argument("--json", action="store_true", help="one JSON object, for programs")
    _join_pages(acts)
    _work_pages(acts)


def _client(arguments: argparse.Namespace) -> int:
    acts = {
        "ledger": _client_ledger,
        "budget": _client_budget,
        "export": _client_export,
        "import": _client_import,
        "join": _client_join,
        "preflight": _client_preflight,
        "renew": _client_renew,
        "start": _client_start,
        "stop": _client_stop,
        "status": _client_status,
        "logs": _client_logs,
        "jobs": _client_jobs,
        "plan": _client_plan,
        "approve": _client_approve,
        "refuse": _client_refuse,
        "policy": _client_policy,
        "worker": _client_worker,
        "tunnel": _client_tunnel,
        "courier": _client_courier,
        "supernode": _client_supernode,
        "metrics": _client_metrics,
        "prepare": _client_prepare,
        "units": _client_units,
    }
    return acts[arguments.act](arguments)


def _work_pages(acts: Any) -> None:
    """Adds what a joined data holder does: take part, decide about jobs, and look how it goes."""

    def act(name: str, text: str) -> Any:
        made = acts.add_parser(name, help=text, description=text, formatter_class=_Page, allow_abbrev=False)
        made.add_argument("--home", metavar="DIR", type=Path, help="the client's folder (default ~/.tacit/client)")
        made.add_argument("--json", action="store_true", help="one JSON object, for programs")
        return made

    start = act("start", "take part: run the worker, the tunnel, the SuperNode and the courier, until Ctrl-C")
    _metrics_flag(start)
    stop = act("stop", "end what start runs; the round that is on is finished first")
    stop.add_argument("--now", action="store_true", help="wait for no round; it is spent, and may be lost")
    act("status", "show what runs, which jobs were offered, and what is left of the budget")
    _logs_page(act("logs", "show what the processes wrote; holder: the sealed log, which says what concerns data"))
    act("jobs", "show the jobs that were offered, and what was decided")
    for name, text in (
        ("plan", "show what one job asks, and what it would cost"),
        ("approve", "let one job use the data, within the budget"),
        ("refuse", "refuse one job, or withdraw from it: its next round is refused"),
    ):
        act(name, text).add_argument("job", metavar="JOB", help="its identity, or the first digits of it")
    policy = act("policy", "show or set what is accepted without asking; by default nothing")
    policy.add_argument("--accept", metavar="TASK", action="append", help="a task whose jobs are accepted; repeatable")
    policy.add_argument("--epsilon", metavar="X", type=float, help="most that one such job may cost")
    policy.add_argument("--nothing", action="store_true", help="accept nothing without asking")
    worker = act("worker", "run the worker alone, under a user who may read the data")
    worker.add_argument("--courier-group", metavar="GROUP", help="group of the user that the courier runs under")
    act("tunnel", "run the tunnel alone")
    act("supernode", "run Flower's SuperNode alone, under a user who may not read the data")
    act("prepare", "choose ports and make certificates for parts that are started one by one")
    courier = act("courier", "run the courier alone, under a user who may not read the data")
    act("metrics", _SHOWS).add_argument("where", metavar="HOST:PORT", help="on loopback; so is a port alone")
    courier.add_argument(
        "--secret", metavar="FILE", type=Path, help="of the SuperNode's interface (default: run/runtime.secret)"
    )
    units = act("units", "write systemd units, a compose file and an image recipe for these parts into a folder")
    for made in (start, worker, units):
        made.add_argument("--device", metavar="TEXT", default="cpu", help="where training runs: cpu, cuda, cuda:N")
    _units_flags(units)
    for made in (worker, courier):
        made.add_argument(
            "--socket", metavar="FILE", type=Path, help="where the two meet (default: run/worker.sock in the home)"
        )


_SHOWS: Final = "serve figures for Prometheus alone, beside parts that are started one by one, until Ctrl-C"


def _metrics_flag(page: Any) -> None:
    page.add_argument(
        "--metrics", metavar="HOST:PORT", help="serve figures for Prometheus there; a port alone is one on loopback"
    )


def _units_flags(page: Any) -> None:
    page.add_argument("folder", metavar="DIR", type=Path, help="where the files are written")
    page.add_argument("--user", metavar="NAME", help="who runs what reads secrets (default: who owns the home)")
    page.add_argument("--program", metavar="FILE", type=Path, help="path of tacit there (default: this one's)")
    page.add_argument("--force", action="store_true", help="replace files that are there")
    page.add_argument("--metrics", metavar="HOST:PORT", help="one unit more, which serves figures for Prometheus there")


def _write_units(arguments: argparse.Namespace, home: Any, files_of: Any, **more: str) -> int:
    from privacy.unit_files import owner_of, write_files

    folder = arguments.folder.expanduser().absolute()
    program = arguments.program or Path(sys.executable).with_name("tacit")
    texts = files_of(
        home,
        owner=owner_of(home.folder, arguments.user),
        program=str(program.absolute()),
        folder=folder,
        version=__version__,
        metrics=arguments.metrics,
        **more,
    )
    written = write_files(folder, texts, force=arguments.force)
    if arguments.json:
        print(json.dumps({"files": [str(path) for path in written]}))
        return 0
    what = f"tacit-{arguments.verb}"
    print("\n".join(_short(str(path)) for path in written))
    print(
        f"\nNext, as root: systemd-sysusers {folder}/{what}.sysusers; cp {folder}/{what}*.{{service,path,target"
        f"{',timer' * (what == 'tacit-client')}}} /etc/systemd/system/; systemctl enable --now {what}.target"
        f"\nOr, with containers: docker compose -f {folder}/compose.yaml up -d"
    )
    return 0


def _places(arguments: argparse.Namespace) -> Any:
    from clients.services import Places

    return Places(_client_home(arguments))


def _until_stopped(*, twice: bool = False) -> Any:
    """Returns an event that SIGTERM and Ctrl-C set; where ``twice``, a second one ends what is on at once."""
    import signal
    import threading

    stop = threading.Event()

    def ask(*_: object) -> None:
        if twice and stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if twice:
            # Not through a buffer: it may be the one that is being written to.
            os.write(2, b"\ntacit: stopping after this round; press Ctrl-C again to stop at once\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    # One line for every request on loopback tells nobody anything.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _client_start(arguments: argparse.Namespace) -> int:
    from clients.isolation import read_note
    from clients.join import renew_when_due
    from clients.services import figures_of, parts_of
    from privacy.errors import IdentityError
    from privacy.processes import Chore, Processes, read_status

    places = _places(arguments)
    name, federation = places.home.settings.name, places.home.settings.federation
    _require_stopped(read_status(places.status), "client")
    if (note := read_note(places.home)) is not None:
        _require_stopped({"pid": note.pid}, "client")
    places.prepare()
    try:
        renew_when_due(places.home, version=__version__)
    except IdentityError as error:
        # It is tried again while the client runs; until it expires, the old one serves.
        print(f"tacit: the certificate is not renewed yet: {error}", file=sys.stderr)
    _log_to_stderr()
    renewal = Chore(name="renewal", do=lambda: renew_when_due(places.home, version=__version__), every_s=300)
    parts = parts_of(places, device=arguments.device)
    offers = Chore(name="offers", do=_tells_of_offers(places, arguments.json), every_s=2, again_s=30)
    processes = Processes(parts, logs=places.logs, status=places.status, chores=[renewal, offers])
    _say_starting(arguments, parts)
    processes.start()
    with _metrics(arguments, processes, loopback=True, collect=lambda: figures_of(places.home)) as shown:
        _say_started_client(arguments, name, federation, places, shown)
        processes.run()
    return 0


def _tells_of_offers(places: Any, silent: bool) -> Callable[[], None]:
    """Returns what says, once for each job, that it waits for the holder's decision."""
    from clients.jobs import Decision, Jobs

    told: set[str] = set()

    def look() -> None:
        for name in sorted(set(Jobs(places.jobs).names()) - told):
            job = Jobs(places.jobs).get(name)
            told.add(name)
            if job is not None and job.decision is Decision.WAITING and not silent:
                print(
                    f"a job of {job.terms.task} waits for your decision; what it asks and costs: tacit client plan "
                    f"{name[:12]}; then approve or refuse it",
                    flush=True,
                )

    return look


def _say_starting(arguments: argparse.Namespace, parts: Sequence[Any]) -> None:
    if not arguments.json:
        print(f"starting {', '.join(part.name for part in parts)} ...", flush=True)


def _say_started_client(arguments: argparse.Namespace, name: str, federation: str, places: Any, shown: str) -> None:
    print(
        json.dumps({"started": True, "name": name, "federation": federation, "pid": os.getpid()})
        if arguments.json
        else f"{name} takes part in {federation}; logs in {_short(str(places.logs))}{shown}; Ctrl-C ends it",
        flush=True,
    )


@contextmanager
def _metrics(arguments: argparse.Namespace, processes: Any, *, loopback: bool, collect: Any) -> Iterator[str]:
    """Serves metrics while the block lasts, where they were asked for; yields words that say so."""
    if arguments.metrics is None:
        yield ""
        return
    from privacy.exposition import Exposition, of_processes, place

    def figures() -> list[Any]:
        return [*of_processes(processes.restarts, processes.running, len(processes.faults)), *collect()]

    try:
        shown = Exposition(*place(arguments.metrics, loopback=loopback), figures)
    except BaseException:
        processes.end()
        raise
    try:
        yield f"; metrics at port {shown.port}"
    finally:
        shown.close()


def _show_metrics(arguments: argparse.Namespace, *, loopback: bool, collect: Any) -> int:
    from privacy.exposition import Exposition, place

    _log_to_stderr()
    stop = _until_stopped()
    shown = Exposition(*place(arguments.where, loopback=loopback), collect)
    print(json.dumps({"port": shown.port}) if arguments.json else f"metrics at port {shown.port}", flush=True)
    try:
        stop.wait()
    finally:
        shown.close()
    return 0


def _group_of(text: str | None) -> int | None:
    """Returns the number of a group that is given by name or number."""
    import grp

    from privacy.errors import PlanError

    if not text or text.isdecimal():
        return int(text) if text else None
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise PlanError(f"expected a group of this machine, got {text!r}; make it first") from None


def _require_stopped(status: Mapping[str, object] | None, what: str) -> None:
    from privacy.errors import RunError

    if status is not None:
        raise RunError(f"expected no {what} to run here yet, got one (pid {status['pid']}); tacit {what} stop ends it")


def _stop(status_file: Path, what: str, as_json: bool, *, patience_s: float = 120.0, now: bool = False) -> int:
    import signal

    from privacy.errors import RunError
    from privacy.processes import read_status

    status = read_status(status_file)
    if status is None:
        raise RunError(f"expected a {what} that runs here, got none; nothing to stop")
    for word in range(1 + now):
        # Told twice, it waits for no round.
        time.sleep(0.5 * word)
        with suppress(ProcessLookupError):
            os.kill(int(str(status["pid"])), signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while read_status(status_file) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"expected the {what} to end within {patience_s:g} s, got none; look into its logs")
        time.sleep(0.1)
    print(json.dumps({"stopped": True}) if as_json else f"the {what} is stopped")
    return 0


def _client_stop(arguments: argparse.Namespace) -> int:
    from clients.services import ROUND_S

    places = _places(arguments)
    _ = places.home.settings
    patience_s = 120.0 if arguments.now else ROUND_S + 120.0
    return _stop(places.status, "client", arguments.json, patience_s=patience_s, now=arguments.now)


def _logs_page(page: Any) -> None:
    page.add_argument("name", nargs="?", metavar="NAME", help="one process (default: all)")
    page.add_argument("--lines", metavar="N", type=int, default=20, help="how many of each (default 20)")
    page.add_argument("--follow", action="store_true", help="go on with what is written, until Ctrl-C")


def _show_logs(arguments: argparse.Namespace, folder: Path) -> int:
    """Shows the ends of the parts' logs, each line after the name of its process."""
    from privacy.errors import RunError
    from privacy.processes import tail

    there = sorted(path.stem for path in folder.glob("*.log"))
    names = [name for name in there if arguments.name in (None, name)]
    if not names:
        raise RunError(
            f"expected a log in {_short(str(folder))}, got {arguments.name or 'none'}; there is: "
            f"{', '.join(there) or 'nothing yet'}"
        )
    shown = {name: tail(folder / f"{name}.log", max(1, arguments.lines)) for name in names}
    if arguments.json:
        print(json.dumps(shown))
        return 0
    width = max(map(len, names))
    for name, lines in shown.items():
        for line in lines:
            print(f"{name:<{width}}  {line}")
    places = {name: (folder / f"{name}.log").stat().st_size for name in names}
    with suppress(KeyboardInterrupt):
        while arguments.follow:
            time.sleep(0.5)
            for name, place in places.items():
                size = (folder / f"{name}.log").stat().st_size
                if size != place:
                    # A log that was begun anew is shown from there.
                    grown = size - place if size > place else size
                    for line in tail(folder / f"{name}.log", _lines_in(folder / f"{name}.log", grown)):
                        print(f"{name:<{width}}  {line}", flush=True)
                    places[name] = size
    return 0


def _lines_in(path: Path, last_bytes: int) -> int:
    """Returns how many lines the last bytes of a file hold."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
        return max(1, file.read().count(b"\n"))


def _client_logs(arguments: argparse.Namespace) -> int:
    if arguments.name == "holder":
        from privacy.vault import read_log

        home = _client_home(arguments)
        lines = list(read_log(home.folder / "log", home.secret()))[-max(1, arguments.lines) :]
        print(json.dumps({"holder": lines}) if arguments.json else "\n".join(lines))
        return 0
    return _show_logs(arguments, _places(arguments).logs)


def _faults(status: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns a row for each chore that could not be done the last time."""
    return {name: f"failed, and is tried again: {words}" for name, words in (status or {}).get("faults", {}).items()}


def _parts_table(status: Mapping[str, Any] | None) -> Any:
    from rich.table import Table

    from privacy.transcript import iso

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("process", "runs", "since", "restarts", "last end"):
        table.add_column(title, no_wrap=title != "last end")
    for name, part in (status["parts"] if status else {}).items():
        table.add_row(
            name, "yes" if part["running"] else "no", iso(part["since"]), str(part["restarts"]), part["last_end"]
        )
    return table


def _job_facts(job: Any, account: Any) -> dict[str, Any]:
    """Returns one job for people and programs."""
    from privacy.errors import PlanError

    plan = job.terms.plan
    try:
        cost = job.cost(account)._asdict()
        fault = ""
    except PlanError as error:
        cost, fault = None, str(error)
    state = account.jobs.get(job.terms.job)
    return {
        "job": job.terms.job,
        "task": job.terms.task,
        "decision": job.decision.value,
        "by": job.by,
        "time": job.time,
        "rounds": plan.rounds,
        "joins": plan.joins,
        "charged": state.charges if state is not None else 0,
        "clients": job.terms.clients,
        "curator": job.terms.curator,
        "purpose": job.terms.purpose,
        "metrics": list(plan.metrics.words) if plan.metrics is not None else [],
        "unit": plan.unit.value,
        "cost": cost,
        "fault": fault,
        "plan": json.loads(plan.to_json()),
    }


def _client_account(places: Any) -> Any:
    from privacy.transcript import read_ledger

    settings = places.home.settings
    return read_ledger(Path(settings.ledger)).accounts[settings.data_set]


def _client_status(arguments: argparse.Namespace) -> int:
    from clients.isolation import look, read_note
    from clients.jobs import Jobs
    from privacy.processes import read_status

    places = _places(arguments)
    settings, status, account = places.home.settings, read_status(places.status), _client_account(places)
    jobs = [_job_facts(job, account) for job in Jobs(places.jobs)]
    found, note = look(places.home), read_note(places.home)
    told = {
        "name": settings.name,
        "federation": settings.federation,
        "running": status is not None or note is not None,
        "isolation": {"verdict": found.apart.value, "words": found.words, "fix": found.fix},
        "rounds_answered": note.rounds if note else 0,
        "parts": status["parts"] if status else {},
        "faults": status.get("faults", {}) if status else {},
        "spent": account.spent,
        "budget": account.grant.epsilon,
        "delta": account.grant.delta,
        "charges": account.charges,
        "jobs": [{key: job[key] for key in ("job", "task", "decision", "charged", "joins")} for job in jobs],
    }
    if arguments.json:
        print(json.dumps(_finite(told), allow_nan=False))
        return 0
    console = _console()
    rows = {
        "client": f"{settings.name} of {settings.federation}",
        "runs": f"yes, pid {status['pid']}"
        if status
        else (f"yes, its worker has pid {note.pid}" if note else "no; start it with: tacit client start"),
        "isolation": found.words,
        **_faults(status),
        "spent": f"epsilon {_epsilon(account.spent)} of {_epsilon(account.grant.epsilon)} at delta "
        f"{account.grant.delta:g}, in {account.charges} charges",
        "jobs": f"{len(jobs)}, {sum(job['decision'] == 'waiting' for job in jobs)} of them wait for a decision"
        if jobs
        else "none was offered yet",
    }
    _print_rows(console, rows)
    if status:
        console.print()
        console.print(_parts_table(status))
    return 0


def _client_jobs(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from clients.jobs import Jobs

    places = _places(arguments)
    account = _client_account(places)
    told = [_job_facts(job, account) for job in Jobs(places.jobs)]
    if arguments.json:
        print(json.dumps(_finite({"jobs": told}), allow_nan=False))
        return 0
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("job", "task", "decision", "charged", "would spend in all"):
        table.add_column(title, no_wrap=True)
    for job in told:
        cost = f"epsilon {_epsilon(job['cost']['after'])}" if job["cost"] else "declined: another unit"
        by = f"{job['decision']} by {job['by']}" if job["by"] else job["decision"]
        table.add_row(job["job"][:12], job["task"], by, f"{job['charged']} of {job['joins']}", cost)
    _console().print(table if told else "no job was offered yet")
    return 0


def _one_job(places: Any, digits: str) -> Any:
    from clients.jobs import Jobs
    from privacy.errors import PlanError

    # Where nobody has joined there are no jobs either, but that is not what is wrong.
    _ = places.home.settings
    # By name alone: another job whose file is damaged is no reason not to withdraw from this one.
    jobs = Jobs(places.jobs)
    found = [name for name in jobs.names() if name.startswith(digits)] if digits else []
    if len(found) != 1:
        raise PlanError(
            f"expected the first digits of one job, got {digits[:40]!r}, which {len(found)} jobs begin with; "
            "list them with: tacit client jobs"
        )
    return jobs.get(found[0])


def _turns_of(plan: Mapping[str, Any]) -> str:
    spare = plan["joins"] - plan["rounds"]
    if spare < 0:
        return f"at most {plan['joins']} of {plan['rounds']} rounds"
    return f"{plan['rounds']} rounds; the cost covers {spare} spare charge{'' if spare == 1 else 's'} for retries"


def _client_plan(arguments: argparse.Namespace) -> int:
    places = _places(arguments)
    account = _client_account(places)
    job = _job_facts(_one_job(places, arguments.job), account)
    if arguments.json:
        print(json.dumps(_finite(job), allow_nan=False))
        return 0
    plan, cost = job["plan"], job["cost"]
    rows = {
        "job": job["job"],
        "asks for": f"{job['task']}, from {job['clients']} clients, {_turns_of(plan)}",
        "curator": job["curator"] or "not said",
        "purpose": job["purpose"] or "not said",
        "protects": _protected(job["unit"]),
        "each step": f"a record joins with probability {plan['sample_rate']:g}, its gradient is clipped to "
        f"{plan['l2_clip']:g}, noise {plan['noise_multiplier']:.3g} x clip",
        "metrics": ", ".join(job["metrics"]) or "none",
    }
    if cost is None:
        rows["cost"] = job["fault"]
    else:
        rows["spent now"] = (
            f"epsilon {_epsilon(cost['spent'])} of {_epsilon(cost['granted'])} at delta {cost['delta']:g}"
        )
        rows["after it"] = f"epsilon {_epsilon(cost['after'])}" + (
            "" if cost["affordable"] else "; the budget does not hold all of it, later rounds will be declined"
        )
    rows["decision"] = job["decision"] + (f", by {job['by']}" if job["by"] else "")
    _print_rows(_console(), rows)
    return 0


def _decide(arguments: argparse.Namespace, word: str) -> int:
    from clients.jobs import Decision, Jobs

    places = _places(arguments)
    job = Jobs(places.jobs).decide(_one_job(places, arguments.job).terms.job, Decision(word))
    told = {"job": job.terms.job, "decision": job.decision.value}
    print(json.dumps(told) if arguments.json else f"job {job.terms.job[:12]} is {job.decision}")
    return 0


def _client_approve(arguments: argparse.Namespace) -> int:
    return _decide(arguments, "approved")


def _client_refuse(arguments: argparse.Namespace) -> int:
    return _decide(arguments, "refused")


def _client_policy(arguments: argparse.Namespace) -> int:
    from clients.jobs import Policy
    from models.catalog import find_task
    from privacy.errors import PlanError
    from privacy.files import write_whole

    places = _places(arguments)
    joined = places.home.settings.policy
    if arguments.nothing and (arguments.accept or arguments.epsilon is not None):
        raise PlanError("expected --nothing alone, or --accept and --epsilon, got both; say one")
    # Who wants to accept nothing may have a policy that cannot be read.
    policy = Policy() if arguments.nothing else Policy.load(places.policy)
    if arguments.accept or arguments.epsilon is not None:
        try:
            tasks = frozenset(find_task(name).name for name in arguments.accept or []) or policy.tasks
        except LookupError as error:
            raise PlanError(str(error)) from None
        epsilon = policy.epsilon if arguments.epsilon is None else arguments.epsilon
        if not tasks or epsilon <= 0:
            raise PlanError("expected --accept TASK and --epsilon X > 0 together, got one of them; say both")
        policy = Policy(tasks=tasks, epsilon=epsilon)
    if arguments.nothing or arguments.accept or arguments.epsilon is not None:
        write_whole(places.policy, policy.to_json())
    told = {
        "accepts": sorted(policy.tasks),
        "epsilon": policy.epsilon,
        "metrics": list(joined.allow_metrics),
        "central": joined.allow_central,
    }
    words = (
        f"accepts jobs of {', '.join(sorted(policy.tasks))} that cost at most epsilon {policy.epsilon:g} each, unasked"
        if policy.tasks
        else "accepts nothing without asking"
    )
    print(json.dumps(told) if arguments.json else words)
    return 0


def _client_worker(arguments: argparse.Namespace) -> int:
    from clients.isolation import Noted
    from clients.services import worker_of
    from clients.worker import Doorway
    from simulations.world import code_hash

    places, group = _places(arguments), _group_of(arguments.courier_group)
    stop = _until_stopped()
    worker = worker_of(places, code=code_hash(), device=arguments.device)
    at = arguments.socket or places.worker
    door, noted = Doorway(at, group=group), Noted(places.home)
    try:
        print(json.dumps({"worker": str(at)}) if arguments.json else "the worker is ready", flush=True)
        door.serve(noted.around(worker), stop.is_set, noted.called)
    finally:
        door.close()
        noted.close()
    return 0


def _client_tunnel(arguments: argparse.Namespace) -> int:
    from clients.services import tunnel_of
    from clients.tunnel import run

    _log_to_stderr()
    run(tunnel_of(_places(arguments)))
    return 0


def _client_units(arguments: argparse.Namespace) -> int:
    from clients.units import files_of

    return _write_units(arguments, _client_home(arguments), files_of, device=arguments.device)


def _client_metrics(arguments: argparse.Namespace) -> int:
    from clients.services import figures_of

    home = _client_home(arguments)
    _ = home.settings
    return _show_metrics(arguments, loopback=True, collect=lambda: figures_of(home))


def _client_prepare(arguments: argparse.Namespace) -> int:
    places = _places(arguments)
    places.prepare()
    print(json.dumps({"ports": places.ports}) if arguments.json else "the parts can be started")
    return 0


def _client_supernode(arguments: argparse.Namespace) -> int:
    from clients.services import parts_of
    from privacy.processes import become

    become(next(part for part in parts_of(_places(arguments)) if part.name == "supernode"))


def _client_courier(arguments: argparse.Namespace) -> int:
    from clients.courier import Courier
    from privacy.vault import private

    _log_to_stderr()
    places, stop = _places(arguments), _until_stopped()
    at = arguments.socket or places.worker
    runtime = f"127.0.0.1:{places.ports[1]}"
    Courier(runtime, private.read(arguments.secret or places.secret), at).run(stop.is_set)
    return 0


def _ledger_folder(arguments: argparse.Namespace) -> Path:
    from clients.home import ClientHome, default_home

    if arguments.folder is None:
        arguments.folder = Path(ClientHome(default_home().expanduser().absolute()).settings.ledger)
    return Path(arguments.folder)


def _client_ledger(arguments: argparse.Namespace) -> int:
    from privacy.transcript import read_ledger

    ledger = read_ledger(_ledger_folder(arguments), arguments.population)
    told = ledger.tell()
    if arguments.json:
        print(json.dumps(_finite(told), allow_nan=False))
        return 0
    from rich.table import Table

    console = _console()
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("time", "data set", "job", "round", "released", "spent", "left"):
        table.add_column(title, justify="right" if title in ("round", "spent", "left") else "left", no_wrap=True)
    for row in told["charges"]:
        left = f"{math.floor(100 * row['remaining'] + 1e-6) / 100:.2f}"
        table.add_row(
            row["time"][:16].replace("T", " "),
            row["name"],
            row["job"][:8],
            str(row["round"]),
            row["released"],
            _epsilon(row["spent"]),
            left,
        )
    if told["charges"]:
        console.print(table)
        console.print()
    _print_budgets(told)
    console.print(f"\n{told['verdict']}", soft_wrap=True)
    return 0


def _print_budgets(told: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("data set", "budget", "spent", "left", "delta", "order", "charges", "key"):
        table.add_column(title, justify="left" if title in ("data set", "key") else "right", no_wrap=True)
    for row in told["accounts"]:
        left = f"{math.floor(100 * row['remaining'] + 1e-6) / 100:.2f}"
        table.add_row(
            row["name"] + (" (test noise)" if row["test_noise"] else ""),
            f"{row['granted']:g}" + (" (raised)" if any(change["raised"] for change in row["changes"]) else ""),
            _epsilon(math.inf if row["test_noise"] else row["spent"]),
            left,
            f"{row['delta']:g}",
            f"{row['order']:g}",
            str(row["charges"]),
            row["key"][:16],
        )
    _console().print(table)


def _client_budget(arguments: argparse.Namespace) -> int:
    from privacy.errors import PlanError
    from privacy.ledger import Book
    from privacy.transcript import holders_grant, read_ledger

    if arguments.name is None:
        if arguments.epsilon is not None or arguments.delta is not None:
            raise PlanError("expected --name NAME with a budget, got none; name the data set")
    elif arguments.epsilon is None:
        raise PlanError("expected --epsilon X with --name, got none; without --name the budgets are shown")
    else:
        with Book(_ledger_folder(arguments), arguments.population) as book:
            if arguments.name in book.accounts:
                grant = book.accounts[arguments.name].grant
                for flag, value, fixed in (
                    ("delta", arguments.delta, grant.delta),
                    ("records-bound", arguments.records_bound, grant.records_bound),
                    ("order", arguments.order or None, grant.order),
                ):
                    if value is not None and value != fixed:
                        raise PlanError(
                            f"expected the {flag} {fixed:g} that was fixed with the first budget, got {value:g}"
                        )
                book.set_budget(arguments.name, arguments.epsilon, may_raise=arguments.may_raise)
            else:
                if arguments.delta is None or arguments.records_bound is None:
                    raise PlanError(
                        "expected --delta and --records-bound with a first budget, got none; they are fixed then"
                    )
                grant = holders_grant(
                    epsilon=arguments.epsilon,
                    delta=arguments.delta,
                    records_bound=arguments.records_bound,
                    order=arguments.order,
                )
                known = sorted(book.populations)
                population = arguments.population or (known[0] if known else "the holder's own data sets")
                book.grant({arguments.name: grant}, population=population)
    told = read_ledger(_ledger_folder(arguments), arguments.population).tell()
    if arguments.json:
        print(json.dumps(_finite({"accounts": told["accounts"]}), allow_nan=False))
    else:
        _print_budgets(told)
    return 0


def _client_export(arguments: argparse.Namespace) -> int:
    from privacy.ledger import Book
    from privacy.transcript import export, read_ledger

    # First read without its key: a folder without a ledger must not get one made.
    read_ledger(arguments.dir)
    with Book(arguments.dir) as book:
        copy = export(book, arguments.file)
    told = {"file": str(arguments.file), "accounts": len(copy.everyone), "charges": len(copy.lines)}
    words = (
        f"wrote {arguments.file}: {told['accounts']} accounts, {told['charges']} charges, signed; it holds no secret"
    )
    print(json.dumps(told) if arguments.json else words)
    return 0


def _client_import(arguments: argparse.Namespace) -> int:
    from privacy.transcript import import_into, read_ledger

    added = import_into(arguments.dir, read_ledger(arguments.file))
    words = (
        f"added {added} entries; if more was charged after the copy was made, peers' receipts will show it"
        if added
        else f"{arguments.dir} has everything that the copy has; nothing was changed"
    )
    print(json.dumps({"added": added}) if arguments.json else words)
    return 0


def _join_pages(acts: Any) -> None:
    """Adds what a data holder does to join, and to stay joined."""
    page = acts.add_parser(
        "join", help="join a federation by its invitation", description=_JOIN, formatter_class=_Page, allow_abbrev=False
    )
    page.add_argument("token", metavar="TOKEN", help="the invitation; - reads it from standard input")
    page.add_argument("--task", metavar="TEXT", required=True, help="what may be learned; see tacit tasks")
    page.add_argument("--data", metavar="PATH", default="", help="where the data lies, for a task that brings none")
    page.add_argument("--epsilon", metavar="X", type=float, help="most that may ever be spent on this data")
    page.add_argument("--delta", metavar="X", type=float, help="at which all spend is priced; fixed for ever")
    page.add_argument(
        "--records-bound",
        metavar="N",
        type=int,
        help="public bound on the number of records (default: what its public description declares)",
    )
    page.add_argument(
        "--allow-metrics",
        metavar="TEXT",
        action="append",
        default=[],
        help="a metric that jobs may ask of your records, noised and charged; repeatable, or with commas",
    )
    page.add_argument(
        "--allow-central", action="store_true", help="let the server see updates in the clear, in a job that asks it"
    )
    page.add_argument("--data-set", metavar="NAME", default="data", help="your own name of the data, in the ledger")
    page.add_argument("--ledger", metavar="DIR", type=Path, help="the ledger that this data has already, if any")
    page.add_argument(
        "--keys", metavar="KEYS", type=Path, help="file of keys that opens the data, where it is sealed by itself"
    )
    preflight = acts.add_parser(
        "preflight",
        help="look whether this client could take part, and how to mend what it could not",
        formatter_class=_Page,
        allow_abbrev=False,
    )
    renew = acts.add_parser(
        "renew", help="renew this client's certificate now", formatter_class=_Page, allow_abbrev=False
    )
    renew.add_argument("--if-due", action="store_true", help="only where two thirds of its life are over")
    for act in (page, preflight, renew):
        act.add_argument("--home", metavar="DIR", type=Path, help="the client's folder (default ~/.tacit/client)")
        act.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _client_home(arguments: argparse.Namespace) -> Any:
    from clients.home import ClientHome, default_home

    return ClientHome((arguments.home or default_home()).expanduser().absolute())


def _client_join(arguments: argparse.Namespace) -> int:
    from clients.join import Choices, join, policy_of, require_fresh, require_unexpired
    from clients.preflight import Verdict, apart, declared_bound, local, located, remote
    from privacy.enrolment import Invitation

    token = sys.stdin.read(4096) if arguments.token == "-" else arguments.token  # noqa: S105 -- the word for standard input
    invitation = Invitation.parse(token)
    require_unexpired(invitation, time.time())
    home = _client_home(arguments)
    require_fresh(home)
    data, bound, keys = located(arguments.data), arguments.records_bound, str(arguments.keys or "")
    policy = policy_of(
        invitation,
        epsilon=arguments.epsilon,
        delta=arguments.delta,
        records_bound=declared_bound(home, arguments.task, data, keys)
        if bound is None and Path(data).exists()
        else bound,
        allow_metrics=[word.strip() for words in arguments.allow_metrics for word in words.split(",") if word.strip()],
        allow_central=arguments.allow_central,
    )
    choices = Choices(
        task=arguments.task,
        data=data,
        policy=policy,
        data_set=arguments.data_set,
        ledger=arguments.ledger,
        keys=keys,
    )
    findings = []
    told: dict[str, object] = {"joined": False, "name": invitation.name, "home": str(home.folder)}
    for finding in local(home, choices):
        findings.append(finding)
        _print_finding(finding, arguments.json)
    if not any(finding.verdict is Verdict.FAILED for finding in findings):
        settings, greeting = join(invitation, home, choices, version=__version__)
        told |= {"joined": True, "federation": settings.federation, "data_set": settings.data_set}
        for look in (remote(home, version=__version__, greeting=greeting), apart(home)):
            for finding in look:
                findings.append(finding)
                _print_finding(finding, arguments.json)
    code = _close_preflight(findings, arguments.json, told)
    if not arguments.json:
        if told["joined"]:
            print(f"\nJoined {told['federation']} as {invitation.name}; this client's home is {home.folder}.")
            print(
                f"Next: tacit client start. A job waits for your decision: tacit client jobs, then approve or refuse; "
                f"or say once what needs none: tacit client policy --accept {settings.task} --epsilon X."
            )
        else:
            print("\nNot joined, and the invitation is still good: mend what failed and join again.")
    return code


def _client_preflight(arguments: argparse.Namespace) -> int:
    from clients.preflight import apart, choices_of, local, remote

    home = _client_home(arguments)
    findings = []
    for look in (local(home, choices_of(home.settings)), remote(home, version=__version__), apart(home)):
        for finding in look:
            findings.append(finding)
            _print_finding(finding, arguments.json)
    return _close_preflight(findings, arguments.json, {"home": str(home.folder)})


def _print_finding(finding: Any, silent: bool) -> None:
    if silent:
        return
    from rich.text import Text

    style = {"ok": "green", "warning": "yellow", "failed": "red"}[finding.verdict.value]
    line = Text(f"{finding.verdict.value:<9}", style=style) + Text(f"{finding.check:<15} ", style="bold")
    console = _console()
    console.print(line + Text(finding.words, style="not bold"), soft_wrap=True)
    if finding.fix:
        console.print(Text(f"{'':<25} -> {finding.fix}", style="not bold"), soft_wrap=True)


def _close_preflight(findings: Sequence[Any], as_json: bool, told: Mapping[str, object]) -> int:
    """Prints JSON if it is wanted; returns the exit code of the first check that failed, or 0."""
    code = next((finding.exit_code for finding in findings if finding.verdict.value == "failed"), 0)
    if as_json:
        rows = [
            {"check": one.check, "verdict": one.verdict.value, "words": one.words, "fix": one.fix} for one in findings
        ]
        print(json.dumps({**told, "ready": code == 0, "checks": rows}))
    return code


def _client_renew(arguments: argparse.Namespace) -> int:
    from clients.join import renew
    from privacy.transcript import iso

    home = _client_home(arguments)
    if arguments.if_due and not home.renewal_due(time.time()):
        print(json.dumps({"renewed": False}) if arguments.json else "not due yet")
        return 0
    until = renew(home, version=__version__)
    print(json.dumps({"until": until}) if arguments.json else f"renewed; good until {iso(until)}")
    return 0


def _server_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "server",
        help="a federation of separate machines: make it, invite, run its jobs",
        description=_SERVER,
        formatter_class=_Page,
        allow_abbrev=False,
    )
    acts = page.add_subparsers(title="verbs", dest="act", metavar="VERB", required=True, parser_class=_Parser)

    def act(name: str, text: str) -> Any:
        made = acts.add_parser(name, help=text, description=text, formatter_class=_Page, allow_abbrev=False)
        made.add_argument("--home", metavar="DIR", type=Path, help="the server's folder (default ~/.tacit/server)")
        made.add_argument("--json", action="store_true", help="one JSON object, for programs")
        return made

    init = act("init", "make the authority, the server's keys and its certificates")
    init.add_argument("--name", metavar="NAME", required=True, help="the federation's name")
    init.add_argument(
        "--address",
        metavar="HOST:PORT",
        action="append",
        required=True,
        help="where clients will reach the gateway; repeatable, also for machines of later days",
    )
    init.add_argument("--enrol-port", metavar="N", type=int, help="port where they join (default: the port above + 1)")
    invite = act("invite", "print one single-use invitation")
    invite.add_argument("name", metavar="NAME", help="the member's name; names are never used again")
    invite.add_argument("--epsilon", metavar="X", type=float, default=0.0, help="budget to ask for; the holder decides")
    invite.add_argument("--delta", metavar="X", type=float, default=0.0, help="delta to ask for")
    invite.add_argument("--expires", metavar="TIME", default="24h", help="how long it is good: 30m, 24h, 7d")
    invite.add_argument("--replace", action="store_true", help="withdraw an invitation that is still good")
    revoke = act("revoke", "shut a member out, or withdraw its invitation")
    revoke.add_argument("name", metavar="NAME", help="the member's name")
    act("members", "show who is invited, enrolled and revoked")
    enrol = act("enrol", "run the endpoint where invitations are redeemed and certificates renewed, until Ctrl-C")
    enrol.add_argument(
        "--listen", metavar="HOST:PORT", help="where to listen (default: the enrolment port, everywhere)"
    )
    start = act("start", "run the relay, the gateway and the enrolment, until Ctrl-C")
    _metrics_flag(start)
    act("stop", "end what start runs")
    act("status", "show what runs, who is enrolled, and who is connected")
    _logs_page(act("logs", "show what the processes wrote"))
    gateway = act("gateway", "run the gateway alone, under a user who may read the folder relay and no other")
    gateway.add_argument("--bell", metavar="FILE", type=Path, help="where it hears of messages (default: in the home)")
    gateway.add_argument("--bell-group", metavar="GROUP", help="group whose members may say so, by name or number")
    act("metrics", _SHOWS).add_argument("where", metavar="HOST:PORT", help="a port alone is one on loopback")
    act("relay", "run the relay alone, under a user who may read no key of the server's")
    prepare = act("prepare", "choose ports and make certificates for parts that are started one by one")
    _units_flags(act("units", "write systemd units, a compose file and an image recipe for these parts into a folder"))
    run = act("run", "run one job with the clients that are enrolled; Ctrl-C ends it after a round, to be resumed")
    run.add_argument("scenario", nargs="?", metavar="scenario.toml", type=Path, help="scenario file")
    run.add_argument("--resume", metavar="RUN", type=Path, help="go on with the job in this folder")
    run.add_argument("--wait", metavar="TIME", default="10m", help="longest wait for the clients: 30m, 24h, 7d")
    run.add_argument(
        "--relay-wait", metavar="TIME", default="24h", help="longest wait for a relay that went away: 30m, 24h, 7d"
    )
    run.add_argument("--quiet", action="store_true", help="print the closing summary only")
    _keys(run, _deployed_groups())
    for made in (init, enrol, start, prepare):
        made.add_argument(
            "--passphrase-file",
            metavar="FILE",
            type=Path,
            help="holds the passphrase of the authority's key (or TACIT_PASSPHRASE; none: the key is not encrypted)",
        )


def _server(arguments: argparse.Namespace) -> int:
    acts = {
        "init": _server_init,
        "invite": _server_invite,
        "revoke": _server_revoke,
        "members": _server_members,
        "enrol": _server_enrol,
        "start": _server_start,
        "stop": _server_stop,
        "status": _server_status,
        "logs": _server_logs,
        "gateway": _server_gateway,
        "metrics": _server_metrics,
        "relay": _server_relay,
        "prepare": _server_prepare,
        "units": _server_units,
        "run": _server_run,
    }
    return acts[arguments.act](arguments)


def _deployed_groups() -> list[str]:
    from simulations.scenario import GROUPS, MACHINE

    return [group for group in GROUPS if group != MACHINE]


def _server_places(arguments: argparse.Namespace) -> Any:
    from server.home import ServerHome
    from server.services import Places

    return Places(ServerHome.open(_server_folder(arguments)))


def _server_start(arguments: argparse.Namespace) -> int:
    from privacy.identity.authority import Authority
    from privacy.processes import Processes, read_status
    from server.services import figures_of, parts_of

    places = _server_places(arguments)
    home, passphrase = places.home, _authority_passphrase(arguments)
    # Here, where somebody reads it: the enrolment would only write it to its log.
    home.renew(Authority.read(home.folder / "authority", passphrase), now=time.time())
    _require_stopped(read_status(places.status), "server")
    places.prepare()
    secret = {"TACIT_PASSPHRASE": passphrase} if passphrase else {}
    parts = parts_of(places, environment=secret)
    processes = Processes(parts, logs=places.logs, status=places.status)
    _say_starting(arguments, parts)
    processes.start()
    same = home.relay_is_server()
    told = {"started": True, "federation": home.settings.name, "pid": os.getpid(), "relay_is_server": same}
    words = (
        f"{home.settings.name} is reached at {', '.join(map(str, home.settings.addresses))}; "
        f"logs in {_short(str(places.logs))}; Ctrl-C ends it"
        + (
            "\nnote: one user runs relay and server, so reports count them as one; to part them: tacit server units"
            * same
        )
    )
    with _metrics(arguments, processes, loopback=False, collect=lambda: figures_of(places)) as shown:
        print(json.dumps(told) if arguments.json else words + shown, flush=True)
        processes.run()
    return 0


def _server_stop(arguments: argparse.Namespace) -> int:
    return _stop(_server_places(arguments).status, "server", arguments.json)


def _server_logs(arguments: argparse.Namespace) -> int:
    return _show_logs(arguments, _server_places(arguments).logs)


def _server_status(arguments: argparse.Namespace) -> int:
    from privacy.errors import RunError
    from privacy.processes import read_status
    from server.services import answers, connected, job_of

    places = _server_places(arguments)
    status = read_status(places.status)
    relay = False
    with suppress(RunError):
        # Parts that units or containers keep up have no supervisor of ours.
        relay = answers("127.0.0.1", places.port)
    try:
        members: list[dict[str, Any]] = connected(places) if relay else []
    except RunError as error:
        members = [{"name": "unknown", "connected": False, "words": str(error)}]
    job = job_of(places)
    told = {
        "federation": places.home.settings.name,
        "running": status is not None or relay,
        "parts": status["parts"] if status else {},
        "faults": status.get("faults", {}) if status else {},
        "members": members,
        "job": job,
    }
    if arguments.json:
        print(json.dumps(told))
        return 0
    console = _console()
    _print_rows(
        console,
        {
            "federation": places.home.settings.name,
            "runs": f"yes, pid {status['pid']}"
            if status
            else ("yes, its relay answers" if relay else "no; start it with: tacit server start"),
            **_members_rows(members, relay),
            **_faults(status),
            **_job_rows(job),
        },
    )
    if status:
        console.print()
        console.print(_parts_table(status))
    return 0


def _members_rows(members: Sequence[Mapping[str, Any]], relay: bool) -> dict[str, str]:
    if not members:
        return {"members": "nobody has joined yet; invite them: tacit server invite NAME"} if relay else {}
    there, away = ([one["name"] for one in members if one["connected"] is wanted] for wanted in (True, False))
    return {"connected": ", ".join(there) or "nobody"} | ({"not connected": ", ".join(away)} if away else {})


def _job_rows(job: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns what the last job said, for people."""
    from server.services import told_by

    if job is None:
        return {}
    state = job["status"] if job["on"] or job["status"] not in ("waiting", "running") else "ended without a word"
    words = f"; {job['words']}" if job.get("words") else ""
    rows = {"job": f"{str(job['job'])[:12]}, {job['task']}, round {job['round']} of {job['rounds']}: {state}{words}"}
    return rows | ({"said": told_by(job["members"])} if job["members"] else {})


def _server_gateway(arguments: argparse.Namespace) -> int:
    import threading

    from server.gateway import run
    from server.services import Counted, Roster, gateway_of

    _log_to_stderr()
    places, stop = _server_places(arguments), threading.Event()
    gateway = gateway_of(places, bell=arguments.bell, group=_group_of(arguments.bell_group))
    for keep in (Roster(places).keep, Counted(places, gateway).keep):
        threading.Thread(target=keep, args=(stop,), daemon=True).start()
    try:
        run(gateway)
    finally:
        stop.set()
    return 0


def _server_metrics(arguments: argparse.Namespace) -> int:
    from server.services import figures_of

    places = _server_places(arguments)
    return _show_metrics(arguments, loopback=False, collect=lambda: figures_of(places))


def _server_relay(arguments: argparse.Namespace) -> int:
    from privacy.processes import become
    from server.services import parts_of

    parts = parts_of(_server_places(arguments), environment={})
    become(next(part for part in parts if part.name == "relay"))


def _server_prepare(arguments: argparse.Namespace) -> int:
    from privacy.identity.authority import Authority

    places = _server_places(arguments)
    places.home.renew(Authority.read(places.home.folder / "authority", _passphrase(arguments)), now=time.time())
    places.prepare()
    print(json.dumps({"port": places.port}) if arguments.json else "the parts can be started")
    return 0


def _server_units(arguments: argparse.Namespace) -> int:
    from server.home import ServerHome
    from server.units import files_of

    return _write_units(arguments, ServerHome.open(_server_folder(arguments)), files_of)


def _server_run(arguments: argparse.Namespace) -> int:
    from server.home import ServerHome
    from simulations.deployment import deploy
    from simulations.scenario import Scenario

    flags = _flags(arguments)
    if arguments.resume is not None:
        scenario = _resumed(arguments.resume, arguments.scenario, flags)
    else:
        scenario = Scenario.layered(arguments.scenario, flags)
    import logging

    # Flower tells of every connection; what matters here is in the rounds.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    silent = arguments.json or arguments.quiet
    display = _Silent() if silent else _Display(scenario)
    stop = _until_stopped(twice=True)
    folder = arguments.resume or (
        Path(scenario.out) if scenario.out else Path("runs") / time.strftime("job-%Y%m%d-%H%M%S")
    )
    how = f"stopped; go on with: tacit server run --resume {_short(str(folder.resolve()))}"
    try:
        with display.shown():
            summary = deploy(
                scenario,
                ServerHome.open(_server_folder(arguments)),
                folder.resolve(),
                resume=arguments.resume is not None,
                wait_s=_seconds(arguments.wait),
                relay_wait_s=_seconds(arguments.relay_wait),
                observer=display,
                stopping=stop.is_set,
            )
    except KeyboardInterrupt:
        return _fail(how if (folder / "job.json").exists() else "stopped", 130)
    if arguments.json:
        print(json.dumps(_finite(summary), allow_nan=False))
    else:
        rows = {"status": summary["status"], "rounds": summary["rounds"], "run folder": _short(str(summary["run"]))}
        metrics = summary["metrics"]
        rows |= {k: _metric(k, v) for k, v in (metrics.items() if isinstance(metrics, Mapping) else ())}
        rows["report"] = _short(str(summary["report"]))
        _print_rows(_console(), rows)
    if summary["status"] == "interrupted":
        return _fail(how, 130)
    return 0


def _server_folder(arguments: argparse.Namespace) -> Path:
    from server.home import default_home

    return Path(arguments.home or default_home()).expanduser().absolute()


def _authority_passphrase(arguments: argparse.Namespace) -> str:
    if arguments.passphrase_file is None:
        return os.environ.get("TACIT_PASSPHRASE", "")
    from privacy.identity.authority import read_private

    return read_private(arguments.passphrase_file).decode(errors="replace").rstrip("\r\n")


def _server_init(arguments: argparse.Namespace) -> int:
    from privacy.enrolment import Address
    from server.home import ServerHome

    addresses = [Address.parse(text) for text in arguments.address]
    port = arguments.enrol_port if arguments.enrol_port is not None else addresses[0].port + 1
    enrol = [Address.parse(str(Address(host, port))) for host in dict.fromkeys(one.host for one in addresses)]
    passphrase = _authority_passphrase(arguments)
    home = ServerHome.create(
        _server_folder(arguments), name=arguments.name, addresses=addresses, enrol=enrol, passphrase=passphrase
    )
    authority, server = home.fingerprints()
    told = {"home": str(home.folder), "authority": authority.hex(), "server": server.hex()}
    if arguments.json:
        print(json.dumps(told | {"enrol": [str(one) for one in enrol], "encrypted": bool(passphrase)}))
        return 0
    rows = {
        "home": home.folder,
        "clients call": ", ".join(map(str, addresses)),
        "they join at": ", ".join(map(str, enrol)),
        "authority": authority.hex(),
        "server key": server.hex(),
        "its keys": "the authority's is encrypted"
        if passphrase
        else "not encrypted: who reads that folder can sign for anybody",
    }
    _print_rows(_console(), rows)
    print("\nNext: tacit server start; then, in another terminal: tacit server invite NAME.")
    return 0


def _seconds(text: str) -> float:
    import re

    from privacy.errors import PlanError

    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if not found:
        raise PlanError(f"expected a time such as 30m, 24h or 7d, got {text[:40]!r}; write a number and its unit")
    return int(found[1]) * {"m": 60.0, "h": 3600.0, "d": 86400.0}[found[2]]


def _server_invite(arguments: argparse.Namespace) -> int:
    from privacy.transcript import iso
    from server.enrol import invite
    from server.home import ServerHome

    invitation = invite(
        ServerHome.open(_server_folder(arguments)),
        arguments.name,
        lifetime_s=_seconds(arguments.expires),
        epsilon=arguments.epsilon,
        delta=arguments.delta,
        replace=arguments.replace,
    )
    if arguments.json:
        print(json.dumps({"name": invitation.name, "token": invitation.token(), "expires": invitation.expires}))
        return 0
    print(f"For {invitation.name}, once, until {iso(invitation.expires)}. It is a secret, and it is shown this once:\n")
    print(invitation.token())
    print("\nThere, on its own machine: tacit client join TOKEN --task T --data PATH --epsilon E --delta D ...")
    return 0


def _server_revoke(arguments: argparse.Namespace) -> int:
    from server.enrol import revoke
    from server.home import ServerHome

    member = revoke(ServerHome.open(_server_folder(arguments)), arguments.name)
    told = member.tell(time.time())
    print(json.dumps(told) if arguments.json else f"{member.name} is revoked; its name is never used again")
    return 0


def _server_members(arguments: argparse.Namespace) -> int:
    from privacy.transcript import iso
    from server.enrol import Registry
    from server.home import ServerHome

    home, now = ServerHome.open(_server_folder(arguments)), time.time()
    told = [member.tell(now) for _, member in sorted(Registry.of(home).members().items())]
    if arguments.json:
        print(json.dumps({"federation": home.settings.name, "members": told}))
        return 0
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("member", "state", "since", "until", "application key"):
        table.add_column(title, no_wrap=True)
    for row in told:
        since = row["revoked"] or row["enrolled"] or row["invited"]
        until = row["certificate_until"] if row["state"] == "enrolled" else row["expires"]
        until = "" if row["state"] == "revoked" else iso(until)[:16]
        table.add_row(row["name"], row["state"], iso(since)[:16], until, row["application"][:16])
    _console().print(table if told else "nobody yet; tacit server invite NAME")
    return 0


def _server_enrol(arguments: argparse.Namespace) -> int:
    import logging
    import signal
    import threading

    from privacy.enrolment import Address
    from privacy.identity.authority import Authority
    from server.enrol import listen, serve
    from server.home import ServerHome

    home = ServerHome.open(_server_folder(arguments))
    authority = Authority.read(home.folder / "authority", _authority_passphrase(arguments))
    at = Address.parse(arguments.listen) if arguments.listen else Address("", home.settings.enrol[0].port)
    listener = listen(at.host, at.port)
    if not arguments.json:
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    print(
        json.dumps({"port": at.port}) if arguments.json else f"enrolment on port {at.port}; Ctrl-C ends it", flush=True
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    serve(home, authority, listener, stop=stop)
    return 0


def _infer_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "infer",
        help="ask a trained model about a record without showing it: publish, keys, queries, a demonstration",
        description=_INFER,
        formatter_class=_Page,
        allow_abbrev=False,
    )
    acts = page.add_subparsers(title="verbs", dest="act", metavar="VERB", required=True, parser_class=_Parser)

    def act(name: str, text: str, whose: str) -> Any:
        made = acts.add_parser(name, help=text, description=text, formatter_class=_Page, allow_abbrev=False)
        if whose:
            default = f"~/.tacit/{whose}"
            made.add_argument("--home", metavar="DIR", type=Path, help=f"the {whose}'s folder (default {default})")
        made.add_argument("--json", action="store_true", help="one JSON object, for programs")
        return made

    serve = act("serve", "publish the heads of runs and answer encrypted queries, until Ctrl-C", "server")
    serve.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders, simulated or deployed")
    serve.add_argument("--name", action="append", default=[], help="the head's name; once per RUN (default: its task)")
    serve.add_argument(
        "--listen", metavar="HOST:PORT", default="", help="where (default: two above the gateway's port)"
    )
    serve.add_argument("--queries", type=int, default=1000, help="most queries of one session and key (default 1000)")
    serve.add_argument("--session", metavar="TIME", default="1h", help="longest session, such as 30m (default 1h)")
    serve.add_argument("--rate", type=float, default=50.0, help="queries a second of one client (default 50)")
    serve.add_argument(
        "--allowance", type=int, default=100_000, help="queries of one client per model, ever (default 100000)"
    )
    serve.add_argument("--feature-bits", type=int, default=0, help="precision of a feature (default 10 to 12)")
    serve.add_argument("--weight-bits", type=int, default=10, help="precision of a weight (default 10)")
    serve.add_argument("--feature-range", type=float, help="bound on the features, where the layers give none")
    serve.add_argument("--float", action="store_true", help="CKKS floating point instead of exact integers")
    serve.add_argument(
        "--hide-weights",
        action="store_true",
        help="answers tell what logits tell (d + 1 honest ones, or fewer chosen ones, tell the head); slower",
    )
    serve.add_argument("--evaluators", type=int, default=1, help="processes that evaluate (default 1)")
    serve.add_argument(
        "--force-unprotected",
        action="store_true",
        help="publish a head that no report vouches for: its training data is not protected, and every client is told",
    )
    log = act("log", "print the log of queries: who, when, which head, cost and verdict; never content", "server")
    log.add_argument("--last", type=int, default=50, help="so many lines (default 50)")
    keygen = act("keygen", "make secret keys and open a session: so many queries, and an end", "client")
    _infer_at(keygen)
    keygen.add_argument(
        "--queries", type=int, default=0, help="how many (default: what the service allows, at most 10000)"
    )
    keygen.add_argument("--life", metavar="TIME", default="", help="how long (default: the same way, at most 24h)")
    keygen.add_argument("--out", metavar="FILE", type=Path, help="the session's file (default: HOME/infer/session)")
    query = act("query", "ask about records: an image, a table's row, an array; they stay here", "client")
    query.add_argument("records", metavar="RECORD", nargs="*", help="FILE.png, FILE.csv:ROW, FILE.npy")
    query.add_argument("--test", metavar="INDEX", type=int, action="append", default=[], help="of the public test set")
    query.add_argument("--session", metavar="FILE", type=Path, help="of keygen (default: HOME/infer/session)")
    query.add_argument("--task", metavar="NAME", action="append", default=[], help="a task of your own to accept")
    demo = act("demo", "train, publish, ask encrypted and compare with plaintext, on this machine", "")
    demo.add_argument("--run", metavar="RUN", type=Path, help="publish this run instead of training one")
    demo.add_argument("--records", type=int, default=0, help="of the public test set (default: all)")
    demo.add_argument("--rounds", type=int, default=5, help="rounds to train (default 5)")
    demo.add_argument("--out", metavar="DIR", type=Path, help="keep everything there (default: nothing is kept)")


def _infer_at(page: Any) -> None:
    page.add_argument("--head", default="", help="name of the head (may be left out where there is one)")
    page.add_argument(
        "--at", metavar="HOST:PORT", default="", help="the service (default: two above the gateway's port)"
    )
    page.add_argument("--task", metavar="NAME", action="append", default=[], help="a task of your own to accept")


def _infer(arguments: argparse.Namespace) -> int:
    acts = {
        "serve": _infer_serve,
        "log": _infer_log,
        "keygen": _infer_keygen,
        "query": _infer_query,
        "demo": _infer_demo,
    }
    return acts[arguments.act](arguments)


def _infer_serve(arguments: argparse.Namespace) -> int:
    import dataclasses

    from clients.inference import PORT_OFFSET
    from privacy.enrolment import Address
    from privacy.errors import PlanError
    from privacy.he import HeadPlan
    from server.door import run
    from server.heads import Terms
    from server.home import ServerHome
    from simulations.inference import published_of, service_of

    home = ServerHome.open(_server_folder(arguments))
    if len(arguments.name) not in (0, len(arguments.runs)):
        raise PlanError(f"expected a --name for each of {len(arguments.runs)} runs or for none, got other numbers")
    terms = Terms(
        queries=arguments.queries,
        session_s=int(_seconds(arguments.session)),
        rate=arguments.rate,
        allowance=arguments.allowance,
        feature_bits=arguments.feature_bits,
        weight_bits=arguments.weight_bits,
        scheme="float" if arguments.float else "exact",
        hide_weights=arguments.hide_weights,
    )
    published = [
        published_of(
            folder,
            home,
            name=name,
            terms=terms,
            feature_range=arguments.feature_range,
            force=arguments.force_unprotected,
        )
        for folder, name in zip(arguments.runs, arguments.name or [""] * len(arguments.runs), strict=True)
    ]
    port = home.settings.addresses[0].port + PORT_OFFSET
    # Port 0 is for programs: they read what it became.
    free = arguments.listen.endswith(":0")
    at = Address.parse(arguments.listen[:-1] + "1") if free else None
    at = at or (Address.parse(arguments.listen) if arguments.listen else Address("", port))
    service = service_of(published, home, host=at.host, port=0 if free else at.port, evaluators=arguments.evaluators)

    def started() -> None:
        heads = [one.offer for one in published]
        plans = [HeadPlan.from_bytes(one.loaded.plan) for one in published]
        if arguments.json:
            told = [
                {
                    "name": one.name,
                    "version": one.version,
                    "privacy": dict(one.privacy),
                    "plan": plan.fields(),
                    "expected": dataclasses.asdict(plan.predict()),
                }
                for one, plan in zip(heads, plans, strict=True)
            ]
            print(json.dumps({"port": service.port, "heads": _finite(told)}), flush=True)
            return
        console = _console()
        for one, plan in zip(heads, plans, strict=True):
            costs, bits = plan.predict(), plan.parameters.modulus.bit_length()
            right = {True: "always right", False: "wrong with at most 2^-100", None: "approximate"}[costs.certain]
            said = one.privacy
            trained = f"epsilon {_epsilon(said['epsilon'])} at delta {said['delta']:g}" if said["guarantee"] else "NONE"
            console.print(
                f"{one.name}: {one.task}, {len(one.classes)} classes, model of round {one.round}; guarantee: {trained}",
                soft_wrap=True,
            )
            console.print(
                f"  {plan.scheme.value}, ring {plan.parameters.ring}, modulus of {bits} bits: "
                f"{costs.security_bits}-bit security, decryption {right}",
                soft_wrap=True,
            )
            console.print(
                f"  {one.query_bytes} bytes up, {one.answer_bytes} down, about {1000 * costs.server_s:.2g} ms here and "
                f"{1000 * costs.client_s:.2g} ms at the client",
                soft_wrap=True,
            )
        console.print(f"answering encrypted queries on port {service.port}; Ctrl-C ends it")

    run(service, started)
    return 0


def _infer_log(arguments: argparse.Namespace) -> int:
    from privacy.vault import read_log
    from server.home import ServerHome

    home = ServerHome.open(_server_folder(arguments))
    texts = read_log(home.folder / "application" / "infer" / "queries.log", home.application_secret())
    lines = [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]
    if arguments.json:
        print(json.dumps({"lines": lines[-arguments.last :]}))
        return 0
    for line in lines[-arguments.last :]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line["time"]))
        size = f"{line['bytes_in']} bytes in, {line['bytes_out']} out, {line['cost_ms']:.2f} ms"
        more = f" ({line['unlogged']} more refusals before it)" if line["unlogged"] else ""
        number = f" {line['number']}" if line["number"] else ""
        print(f"{when}  {line['client']}  {line['kind']}{number} {line['head']}  {line['verdict']}  {size}{more}")
    return 0


def _infer_session(arguments: argparse.Namespace, named: Path | None) -> tuple[Any, Path]:
    home = _client_home(arguments)
    return home, named or home.folder / "infer" / "session"


def _infer_keygen(arguments: argparse.Namespace) -> int:
    from contextlib import closing

    from clients.inference import Asker, Service, require_free, save
    from privacy.enrolment import Address
    from privacy.errors import PlanError

    home, path = _infer_session(arguments, arguments.out)
    service = Service.of(home, Address.parse(arguments.at) if arguments.at else None)
    tasks = [home.settings.task, *arguments.task]
    life_s = max(1, int(_seconds(arguments.life))) if arguments.life else 0
    if arguments.queries < 0:
        raise PlanError(f"expected a number of queries, got {arguments.queries}; give 1 or more")
    require_free(path)
    with closing(service):
        asker = Asker.begin(
            service, home.identity(), arguments.head, queries=arguments.queries, life_s=life_s, tasks=tasks
        )
    save(asker, path, home.secret())
    offer = asker.offer
    if arguments.json:
        told = {"session": str(path), "head": offer.name, "queries": asker.left, "until": asker.until}
        print(json.dumps(_finite(told | {"approximate": asker.approximate, "privacy": dict(offer.privacy)})))
        return 0
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(asker.until))
    rows: dict[str, object] = {
        "head": f"{offer.name}: {', '.join(offer.classes[:12])}{', ...' if len(offer.classes) > 12 else ''}",
        "trained": str(offer.privacy.get("words", "")),
        "session": f"{asker.left} queries, until {until}; secret keys in {_short(str(path))}, sealed",
    }
    if asker.approximate:
        rows["warning"] = "answers are approximate: never share these numbers, they tell the key to who computed them"
    _print_rows(_console(), rows)
    return 0


def _infer_query(arguments: argparse.Namespace) -> int:
    from contextlib import closing

    import torch

    from clients.data import load_source
    from clients.inference import load
    from clients.question import public_record, read_record
    from models.catalog import find_task
    from privacy.errors import PlanError

    home, path = _infer_session(arguments, arguments.session)
    if not arguments.records and not arguments.test:
        raise PlanError("expected records to ask about, got none; give files, or --test INDEX")
    # Nothing else uses the session until its connection was closed and its answers were decrypted, in this order.
    with closing(load(path, home, [home.settings.task, *arguments.task])) as asker:
        offer = asker.offer
        task = find_task(offer.task)  # One of those that `load` accepts.
        named = [(place, read_record(place, offer.inputs, offer.prepare, task.features)) for place in arguments.records]
        if arguments.test:
            source = load_source(task, data=home.settings.data or None)
            named += [(f"test {index}", public_record(source, index)) for index in arguments.test]
        began = time.perf_counter()
        replies = asker.ask_many(torch.cat([record for _, record in named]))
    seconds = time.perf_counter() - began
    if arguments.json:
        answers = [
            {"record": place, "class": reply.name, "label": reply.label, "logits": reply.logits.tolist()}
            for (place, _), reply in zip(named, replies, strict=True)
        ]
        print(json.dumps(_finite({"answers": answers, "left": asker.left, "seconds": seconds}), allow_nan=False))
        return 0
    rows: dict[str, object] = {place: reply.name for (place, _), reply in zip(named, replies, strict=True)}
    rows["session"] = f"{asker.left} queries left; {1000 * seconds / len(named):.1f} ms a query"
    _print_rows(_console(), rows)
    return 0


def _infer_demo(arguments: argparse.Namespace) -> int:
    import tempfile

    from simulations.inference import demonstrate
    from simulations.scenario import Scenario

    console = _console_on_errors()

    def note(text: str) -> None:
        if not arguments.json:
            console.print(text, style="dim", soft_wrap=True)

    def train(folder: Path) -> object:
        from simulations.run import simulate as run_it

        return run_it(Scenario.layered(None, {"rounds": arguments.rounds}), out=folder, observer=_Silent())

    with tempfile.TemporaryDirectory(prefix="tacit-infer-") as scratch:
        folder = (arguments.out or Path(scratch)).resolve()
        facts = demonstrate(folder, run=arguments.run, records=arguments.records, note=note, train=train)
    if arguments.json:
        print(json.dumps(_finite(facts), allow_nan=False))
        return 0 if facts["exact"] == facts["records"] else 7
    took: Any = facts["latency_ms"]
    privacy: Any = facts["privacy"]
    trained = f"epsilon {_epsilon(privacy['epsilon'])}" if privacy["guarantee"] else "no guarantee"
    rows: dict[str, object] = {
        "predictions": f"{facts['agree']} of {facts['records']} the same as in plaintext; accuracy "
        f"{_metric('accuracy', float(str(facts['accuracy'])))}",
        "logits": f"{facts['exact']} of {facts['records']} records: every one equal to the plaintext integers'",
        "head": f"{facts['features']} features, {facts['classes']} classes, trained with {trained}",
        "a query": f"{took['p50']:.2f} ms (p99 {took['p99']:.2f}): encrypt {took['encrypt']:.2f}, ask over TLS "
        f"{took['ask']:.2f}, decrypt {took['decrypt']:.2f}",
        "bytes": f"{facts['bytes_up']} up, {facts['bytes_down']} down, in front of TLS",
        "server": "held no key of the client, saw ciphertexts alone",
    }
    _print_rows(_console(), rows)
    return 0 if facts["exact"] == facts["records"] else 7


def _vault_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "vault",
        help="seal files and folders, open them, change their keys",
        description=_VAULT,
        epilog=_VAULT_EXAMPLES,
        formatter_class=_Page,
        allow_abbrev=False,
    )
    acts = page.add_subparsers(title="verbs", dest="act", metavar="VERB", required=True, parser_class=_Parser)

    def act(name: str, text: str, place: str, told: str, *, many: bool = False) -> Any:
        made = acts.add_parser(name, help=text, description=text, formatter_class=_Page, allow_abbrev=False)
        made.add_argument(place.lower(), metavar=place, type=Path, help=told, **({"nargs": "+"} if many else {}))
        made.add_argument("--json", action="store_true", help="one JSON object, for programs")
        made.add_argument("--passphrase-file", metavar="FILE", type=Path, help="private file that holds a passphrase")
        if name != "keygen":
            made.add_argument("--keys", metavar="KEYS", type=Path, help="file of keys (default TACIT_VAULT_KEYS)")
        return made

    made = act("keygen", "make a file of keys, mode 0600", "KEYS", "where")
    made.add_argument("--passphrase", action="store_true", help="ask for a passphrase to seal it under")
    made.add_argument("--recovery", action="store_true", help="a recovery key; its public half goes to KEYS.pub")
    made = act("encrypt", "seal a file, or a folder as one file", "PATH", "what; it stays where it is")
    made.add_argument("--out", metavar="FILE", type=Path, help="where (default PATH.sealed)")
    made.add_argument("--passphrase", action="store_true", help="ask for a passphrase to seal under, without keys")
    made.add_argument(
        "--recovery", metavar="FILE", type=Path, action="append", default=[], help="public recovery key; repeatable"
    )
    made.add_argument("--purpose", metavar="WORD", default="data", help="what it is for (default data)")
    made.add_argument("--run", metavar="TEXT", default="", help="the run that it belongs to")
    made.add_argument("--replace", action="store_true", help="replace a sealed file: its next generation")
    text = "give a program one private file of a home, on standard output"
    opening = acts.add_parser("open", help=text, description=text, formatter_class=_Page, allow_abbrev=False)
    opening.add_argument("file", metavar="FILE", type=Path, help="such as keys/tls.pem; its keyring lies beside it")
    made = act("decrypt", "open a sealed file; it appears once all of it was verified", "FILE", "the sealed file")
    made.add_argument("--out", metavar="PATH", type=Path, help="where (default FILE without .sealed)")
    made.add_argument("--purpose", metavar="WORD", help="what it must be for")
    made.add_argument("--object", metavar="HEX", help="which object it must be")
    made.add_argument("--run", metavar="TEXT", help="which run it must belong to")
    made.add_argument("--generation", metavar="N", type=int, default=0, help="which generation it must be")
    made.add_argument("--at-least", metavar="N", type=int, default=0, help="the oldest generation it may be")
    made.add_argument("--replace", action="store_true", help="replace a file that is there")
    made = act(
        "rotate",
        "move sealed files to the newest key; their content is not touched",
        "PATH",
        "sealed files, and folders of them",
        many=True,
    )
    made.add_argument("--new-key", action="store_true", help="make a new key first")
    made.add_argument("--revoke", action="store_true", help="forget the older keys, if every file was moved")
    made.add_argument("--new-passphrase", action="store_true", help="ask for a passphrase in place of the files' own")
    made.add_argument("--new-passphrase-file", metavar="FILE", type=Path, help="the same, from a private file")
    made.add_argument(
        "--recovery", metavar="FILE", type=Path, action="append", default=[], help="public recovery key to add"
    )
    made = act(
        "inspect",
        "say what sealed files are, or which keys a keyring has",
        "PATH",
        "sealed files, folders of them, or a keyring",
        many=True,
    )
    made.add_argument("--verify", action="store_true", help="open each and check all of it")


def _vault(arguments: argparse.Namespace) -> int:
    acts = {
        "keygen": _vault_keygen,
        "encrypt": _vault_encrypt,
        "decrypt": _vault_decrypt,
        "open": _vault_open,
        "rotate": _vault_rotate,
        "inspect": _vault_inspect,
    }
    return acts[arguments.act](arguments)


def _vault_keygen(arguments: argparse.Namespace) -> int:
    from privacy.vault.command import keygen
    from privacy.vault.unlock import passphrase_from

    passphrase = passphrase_from(arguments.passphrase_file, _new_passphrase if arguments.passphrase else None)
    told = keygen(arguments.keys, passphrase, recovery=arguments.recovery)
    words = [f"{told['file']}: key {told['key'][:8]}, {'sealed' if told['sealed'] else 'private by its mode alone'}"]
    if "public" in told:
        words.append(f"{told['public']}: its public half, for --recovery; keep the private one elsewhere")
    else:
        words.append("Back it up: what it seals is lost without it.")
    print(json.dumps(told) if arguments.json else "\n".join(words))
    return 0


def _vault_encrypt(arguments: argparse.Namespace) -> int:
    from privacy.errors import VaultError
    from privacy.vault.command import encrypt, recovery_in
    from privacy.vault.keys import Keyring, Passphrase, Recipient

    recipients: list[Recipient] = [recovery_in(path) for path in arguments.recovery]
    if arguments.passphrase and arguments.keys is None:
        recipients.append(Passphrase(_new_passphrase()))
    else:
        for key in _openers(arguments, required=not recipients):
            if not isinstance(key, Keyring | Passphrase):
                raise VaultError("expected a keyring to seal for, got a recovery key; name its .pub with --recovery")
            recipients.append(key)
    with _progress(arguments, "sealing", _size_of(arguments.path)) as progress:
        told = encrypt(
            arguments.path,
            arguments.out,
            recipients,
            purpose=arguments.purpose,
            run=arguments.run,
            replace=arguments.replace,
            progress=progress,
        )
    words = (
        f"{told['file']}: sealed for {', '.join(told['sealed_for'])}, object {told['object'][:8]}, "
        f"generation {told['generation']}\n{told['source']} is still there in clear."
    )
    print(json.dumps(told) if arguments.json else words)
    return 0


def _vault_decrypt(arguments: argparse.Namespace) -> int:
    from privacy.vault.command import decrypt
    from privacy.vault.container import Wanted

    wanted = Wanted(
        purpose=arguments.purpose,
        object=arguments.object,
        run=arguments.run,
        generation=arguments.generation,
        at_least=arguments.at_least,
    )
    with _progress(arguments, "opening", _size_of(arguments.file)) as progress:
        told = decrypt(
            arguments.file, arguments.out, _openers(arguments), wanted, replace=arguments.replace, progress=progress
        )
    words = f"{told['file']}: {told['content']}, generation {told['generation']}, verified; it is in clear now"
    print(json.dumps(told) if arguments.json else words)
    return 0


def _vault_open(arguments: argparse.Namespace) -> int:
    from privacy.errors import VaultError
    from privacy.vault import private

    if sys.stdout.isatty():
        raise VaultError("expected a program to give the key to, got a terminal; a key is not for eyes, pipe it")
    try:
        content = private.read(arguments.file)
    except OSError as error:
        raise VaultError(f"expected a private file at {arguments.file}, got: {error.strerror or error}") from None
    sys.stdout.buffer.write(content)
    sys.stdout.flush()
    return 0


def _vault_rotate(arguments: argparse.Namespace) -> int:
    from privacy.errors import PlanError, VaultError
    from privacy.vault.command import recovery_in, rotate
    from privacy.vault.keys import Passphrase
    from privacy.vault.unlock import passphrase_in

    keys = arguments.keys or (Path(named).expanduser() if (named := os.environ.get("TACIT_VAULT_KEYS")) else None)
    new = None
    if arguments.new_passphrase_file is not None:
        new = passphrase_in(arguments.new_passphrase_file)
    elif arguments.new_passphrase:
        new = Passphrase(_new_passphrase())
    if keys is None and (arguments.new_key or arguments.revoke):
        raise PlanError("expected --keys KEYS with --new-key and --revoke, got none; name the keyring")
    with _progress(arguments, "changing keys", 0) as progress:
        told = rotate(
            arguments.path,
            keys,
            lambda: _passphrase(arguments),
            new_key=arguments.new_key,
            revoke=arguments.revoke,
            new_passphrase=new,
            recoveries=[recovery_in(path) for path in arguments.recovery],
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(told))
    else:
        for path, sentence in told["failed"].items():
            print(f"{path}: {sentence}", file=sys.stderr)
        print(
            f"{len(told['changed'])} files changed, {told['unchanged']} had the right keys, "
            f"{len(told['failed'])} failed"
        )
        if told["revoked"]:
            print(f"revoked: {', '.join(kid[:8] for kid in told['revoked'])}")
    return VaultError.exit_code if told["failed"] else 0


def _vault_inspect(arguments: argparse.Namespace) -> int:
    from privacy.errors import VaultError
    from privacy.vault.command import is_key_file, look, ring_facts

    rings = {
        str(path): ring_facts(path, lambda: _passphrase(arguments))
        for path in arguments.path
        if is_key_file(path) and not arguments.verify
    }
    paths = [path for path in arguments.path if str(path) not in rings]
    with _progress(arguments, "looking", 0) as progress:
        rows = look(paths, _openers(arguments) if arguments.verify else None, progress) if paths else []
    if arguments.json:
        print(json.dumps({"files": rows, "keyrings": rings}))
    else:
        console = _console()
        for path, keys in rings.items():
            console.print(f"{path}: keyring", soft_wrap=True)
            _print_rows(console, {key["key"][:8]: f"{key['state']}, made {key['created']}" for key in keys})
        for row in rows:
            result = row["fault"] or ("whole and unaltered" if row["verified"] else "not verified")
            console.print(f"{row['file']}: {result}", soft_wrap=True)
            if "purpose" in row:
                told = {
                    "is": f"{row['purpose']}, {row['content']}, generation {row['generation']} of {row['object']}"
                    + (f", run {row['run']}" if row["run"] else ""),
                    "sealed for": ", ".join(row["sealed_for"]) or "nobody that can be read",
                    "content": f"{row['content_bytes']} bytes, sealed {row['created']}",
                }
                if row["interrupted"]:
                    told["keys"] = "a change of keys was interrupted; rotate goes on with it"
                _print_rows(console, told)
    return VaultError.exit_code if any(row["fault"] for row in rows) else 0


def _openers(arguments: argparse.Namespace, *, required: bool = True) -> list[Any]:
    """Returns what opens, from flags, environment or a person."""
    from privacy.vault.unlock import openers_from

    if (
        not required
        and arguments.keys is None
        and not any(
            name in os.environ for name in ("TACIT_VAULT_KEYS", "TACIT_VAULT_PASSPHRASE", "TACIT_VAULT_PASSPHRASE_FILE")
        )
        and arguments.passphrase_file is None
    ):
        return []
    return list(openers_from(arguments.keys, lambda: _passphrase(arguments)))


def _passphrase(arguments: argparse.Namespace) -> Any:
    from privacy.errors import VaultError
    from privacy.vault.unlock import passphrase_from

    ask = (lambda: _asked("Passphrase: ")) if sys.stdin.isatty() else None
    # Asked once for a command, however many files need it.
    if not hasattr(arguments, "found_passphrase"):
        arguments.found_passphrase = passphrase_from(arguments.passphrase_file, ask)
    if arguments.found_passphrase is None:
        raise VaultError(
            "expected --keys KEYS or a passphrase, got none; use --passphrase-file FILE, TACIT_VAULT_PASSPHRASE or a "
            "terminal"
        )
    return arguments.found_passphrase


def _asked(prompt: str) -> str:
    import getpass

    return getpass.getpass(prompt, stream=sys.stderr)


def _new_passphrase() -> str:
    from privacy.errors import VaultError

    if not sys.stdin.isatty():
        raise VaultError("expected a terminal to ask for a passphrase, got none; use --passphrase-file FILE")
    first = _asked("New passphrase: ")
    if _asked("Again: ") != first:
        raise VaultError("expected the same passphrase twice, got two; try again")
    return first


def _recommend_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "recommend",
        help="films for a user, by a trained recommender",
        description="Recommends films by what a run has trained. The user's own part is solved here, from the user's "
        "ratings, and kept nowhere; it costs no privacy.",
        formatter_class=_Page,
        allow_abbrev=False,
    )
    page.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    page.add_argument(
        "--user",
        metavar="RATINGS.csv|ID",
        required=True,
        help="the user's ratings, with the columns film and rating; or, where the data set is at hand, a user of it",
    )
    page.add_argument("--top", metavar="N", type=int, default=10, help="length of the list (default 10)")
    page.add_argument("--data", metavar="PATH", default=None, help="where the films are described (default: the run's)")
    page.add_argument("--age", metavar="YEARS", type=float, help="of the user, for a model by features")
    page.add_argument("--gender", choices=("F", "M"), help="as the data set has it")
    page.add_argument("--occupation", metavar="WORD", help="as the data set has it")
    page.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def _recommend(arguments: argparse.Namespace) -> int:
    use = importlib.import_module("simulations.use")
    told = use.recommend(
        arguments.run,
        arguments.user,
        top=arguments.top,
        data=arguments.data,
        age=arguments.age,
        gender=arguments.gender,
        occupation=arguments.occupation,
    )
    if arguments.json:
        print(json.dumps(told))
        return 0
    console = _console()
    console.print(f"for {told['user']}, who rated {told['ratings']} films; stars are predicted", soft_wrap=True)
    for film in told["films"]:
        console.print(f"  {film['stars']:.2f}  {film['title']}", soft_wrap=True)
    return 0


def _play_page(kinds: Any) -> None:
    page = kinds.add_parser(
        "play",
        help="games of a trained agent",
        description="Plays greedy episodes of gymnasium's game by what a run has trained, each on another machine; by "
        "default on machines that no client has.",
        formatter_class=_Page,
        allow_abbrev=False,
    )
    page.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    page.add_argument("--episodes", metavar="N", type=int, default=10, help="how many (default 10)")
    page.add_argument("--seed", metavar="N", type=int, default=2, help="of the machines and first states (default 2)")
    page.add_argument("--gif", metavar="FILE", type=Path, help="write the first episode as a moving picture")
    page.add_argument("--frames", metavar="DIR", type=Path, help="write its pictures, one PNG file each")
    page.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def _play(arguments: argparse.Namespace) -> int:
    use = importlib.import_module("simulations.use")
    told = use.play(
        arguments.run,
        episodes=arguments.episodes,
        seed=arguments.seed,
        gif=arguments.gif,
        frames=arguments.frames,
    )
    if arguments.json:
        print(json.dumps(told))
        return 0
    worst, best = min(told["returns"]), max(told["returns"])
    rows = {"game": told["game"], "mean return": f"{told['return']:.1f} over {len(told['returns'])} greedy episodes"}
    rows["from, to"] = f"{worst:g}, {best:g}"
    if arguments.gif:
        rows["picture"] = str(arguments.gif)
    _print_rows(_console(), rows)
    return 0


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextmanager
def _progress(arguments: argparse.Namespace, words: str, size: int) -> Iterator[Any]:
    """Shows a bar where a person would wait: on a terminal, for more than 64 MB or an unknown amount."""
    if arguments.json or not sys.stderr.isatty() or 0 < size < 64_000_000:
        yield lambda done, total: None
        return
    from rich.progress import Progress

    with Progress(console=_console_on_errors(), transient=True) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console_on_errors() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


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
            "clients": f"{scenario.clients}, "
            + ("each with its own data and ledger" if "relay" in info else f"{scenario.partition} partition")
            + cohort,
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
        where = f"{info.get('engine', scenario.engine)} engine, {info.get('device', scenario.device)}"
        rows["runs on"] = f"separate machines, by the relay at {info['relay']}" if "relay" in info else where
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


def _said(told: Mapping[str, Any]) -> str:
    """Returns clients' pooled metrics in words, each with the standard error that its noise causes."""
    words = []
    for name, figure in told.items():
        value, error = figure.get("value"), figure.get("stderr")
        if value is None or error is None:
            words.append(f"{name} unknown (drowned by its noise)")
        elif isinstance(value, list):
            words.append(f"{name} {', '.join(f'{number:.0f}' for number in value)} +- {error:.0f} each")
        elif name == "count":
            words.append(f"{name} {value:.0f} +- {error:.0f} records")
        else:
            words.append(f"{name} {_metric(name, value)} +- {_metric(name, error)}")
    return "; ".join(words)


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
    trusts = "the server, which sees each client's update: against it there is no guarantee"
    if law := plan.get("banded"):
        return {
            "schedule": f"{plan['rounds']} rounds; {law['separation']} classes of clients take turns in public, each "
            f"in {plan['turns']} rounds at most; no discount for chance",
            "each round": f"an update of {plan['steps']} plain steps is clipped to {plan['l2_clip']:g}; the server "
            f"adds a row of one matrix of {len(law['coefficients'])} bands to the sum, noise multiplier "
            f"{plan['noise_multiplier']:.3g} for all of it, divides by {plan['expected_batch']:g}",
            "trusts": trusts,
        }
    spare = plan["joins"] - plan["turns"]
    follows = f", then follows the quantile {plan['quantile']:g} of them" if plan.get("quantile") else ""
    return {
        "schedule": f"{plan['rounds']} rounds; a client takes part with probability {plan.get('client_rate', 1):g} and "
        f"in {plan['turns']} at most; the noise also covers {spare} spare charge{'' if spare == 1 else 's'} for "
        "retries",
        "each round": f"an update of {plan['steps']} plain steps is clipped to {plan['l2_clip']:g}{follows}; the "
        f"server adds noise {plan['noise_multiplier']:.3g} x clip to the sum, divides by {plan['expected_batch']:g}",
        "trusts": trusts,
    }


def _closing(summary: Mapping[str, object]) -> None:
    from rich.text import Text

    delta, seconds, metrics = (summary.get(name) for name in ("delta", "seconds", "metrics"))
    at = f"at delta {delta:g}" if isinstance(delta, float) else "at an unknown delta"
    rows: dict[str, object] = {}
    for name, value in (metrics if isinstance(metrics, Mapping) else {}).items():
        rows[str(name)] = _metric(str(name), float(value))
    if isinstance(told := summary.get("client_metrics"), Mapping):
        rows["clients say"] = f"{_said(told)} (noised; the last round's incoming model on their own records)"
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
