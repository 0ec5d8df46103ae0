"""A scenario: every knob of one simulated job, in one frozen value.

The fields of `Scenario` are the only list of scenario keys. Flags, their help, TOML files, Flower's run
configuration and the defaults in ``pyproject.toml`` all come from the metadata of these fields: they cannot
disagree.

Keys are kebab-case words (``sample-rate``), fields are the same words in snake case (``sample_rate``). This
module imports neither PyTorch nor Flower: ``tacit --help`` prints a page from it in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from privacy.errors import PlanError, RunError
from privacy.files import write_whole
from privacy.plan import MOST_BANDS, Metric, Metrics, Mode, Optimizer, Unit, check_delta, require

Value = str | int | float

CONFIG_FILE: Final = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """What is public knowledge about one scenario key: its name, type, range, default, and what it means.

    Attributes:
        name: Kebab-case name, the same in flags, TOML and Flower's run configuration.
        default: Value where neither the task, the file nor the command line says anything.
        group: Heading under which ``tacit simulate --help`` lists it.
        help: One sentence without a full stop; says what 0 or -1 stands for where that is special.
        unit: Unit of the value, or "" for a pure number or a word.
        choices: The closed set of words, or () where the set is open.
        least: Smallest legal number, or None.
        most: Largest legal number, or None.
        exclusive: Whether ``least`` itself is illegal.
    """

    name: str
    default: Value
    group: str
    help: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    exclusive: bool = False

    @property
    def field(self) -> str:
        """Name of the `Scenario` field."""
        return self.name.replace("-", "_")

    @property
    def kind(self) -> type:
        """Type of the value: str, int or float."""
        return type(self.default)

    @property
    def range(self) -> str:
        """The legal values in words, for messages and help; "" where everything is legal."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        relation = ">" if self.exclusive else ">="
        low = "" if self.least is None else f"{self.name} {relation} {self.least:g}"
        if self.most is None:
            return low
        lower = "" if self.least is None else f"{self.least:g} {'<' if self.exclusive else '<='} "
        return f"{lower}{self.name} <= {self.most:g}"

    def read(self, value: object) -> Value:
        """Returns ``value`` as this key's type, checked against its range.

        Text is parsed, so that a flag and a TOML value mean the same. A whole number passes for a float; a
        float, a boolean or other text never passes for a whole number.

        Args:
            value: What a flag, a file or a run configuration holds.

        Raises:
            PlanError: The value has another type, is not finite, or lies outside the range.
        """
        result = self._typed(value)
        if self.choices and result not in self.choices:
            raise PlanError(
                f"expected {self.name} to be {self.range}, got {result!r}{nearest(str(result), self.choices)}"
            )
        if isinstance(result, str):
            return result
        low = self.least is not None and (result < self.least or (self.exclusive and result == self.least))
        high = self.most is not None and result > self.most
        if low or high or not math.isfinite(result):
            raise PlanError(f"expected {self.range or 'a finite ' + self.name}, got {self.name}={result}")
        return result

    def _typed(self, value: object) -> Value:
        words = {str: "text", int: "a whole number", float: "a number"}[self.kind]
        wrong = PlanError(f"expected {self.name} to be {words}, got {value!r}; its default is {self.default!r}")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise wrong
        if self.kind is str:
            if not isinstance(value, str):
                raise wrong
            return str(value)
        if self.kind is int and isinstance(value, float):
            raise wrong
        try:
            return int(value) if self.kind is int else float(value)
        except ValueError:
            raise wrong from None


JOB: Final = "the job"
PRIVACY: Final = "privacy, per client"
CENTRAL: Final = "privacy by a trusted server, with unit client"
LEARNING: Final = "learning at a client"
SERVER: Final = "learning at the server"
DATA: Final = "how the simulation deals out the data"
MACHINE: Final = "this machine"
FOLDERS: Final = "folders"
GROUPS: Final = (JOB, PRIVACY, CENTRAL, LEARNING, SERVER, DATA, MACHINE, FOLDERS)


def _key(default: Any, group: str, text: str, **facts: Any) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **facts})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """Every knob of one simulated job; ``tacit simulate --help`` says what each of them means.

    A scenario is public: it holds no record, no count of a private data set and no random draw.

    Raises:
        PlanError: A value is out of range, or two values contradict each other.
    """

    task: str = _key("digits", JOB, "what is learned: a name from 'tacit tasks', or package.module:attribute")
    data: str = _key("", JOB, "file or folder of the task's data; empty = where the task looks by itself")
    clients: int = _key(10, JOB, "data holders in the federation", least=1)
    rounds: int = _key(20, JOB, "rounds of training", least=1)
    cohort: int = _key(0, JOB, "clients asked in each round; 0 = all", least=0)
    curator: str = _key("", JOB, "who answers for the product, in words for the report; empty = not stated")
    purpose: str = _key("", JOB, "what the model is for, in words for the report; empty = not stated")
    data_domain: str = _key("", JOB, "what the data is about, in words for the report; empty = not stated")
    seed: int = _key(
        0, JOB, "seed of what is public (initial model, partition, cohorts); never of noise or coins", least=0
    )

    unit: str = _key(
        "record",
        PRIVACY,
        "what is protected: a record, by each client itself; or a client with all its records, by a server that sees "
        "its updates and is trusted to add the noise",
        choices=tuple(u.value for u in Unit),
    )
    epsilon: float = _key(
        3.0,
        PRIVACY,
        "each client's budget for the whole job (add or remove a record; with unit client the client, against whoever "
        "sees who takes part); 0 = follows from noise-multiplier",
        least=0.0,
    )
    delta: float = _key(
        1e-5,
        PRIVACY,
        "probability at which epsilon holds; must be below 1/records-bound",
        least=0.0,
        exclusive=True,
    )
    noise_multiplier: float = _key(
        0.0,
        PRIVACY,
        "standard deviation of the noise on a clipped sum / l2-clip; 0 = solved from epsilon",
        least=0.0,
    )
    sample_rate: float = _key(
        0.5,
        PRIVACY,
        "probability with which a record joins a step (Poisson); with unit client it is just the local batch",
        least=0.0,
        most=1.0,
        exclusive=True,
    )
    records_per_client: int = _key(
        0,
        PRIVACY,
        "declared, public number of records of a client, which sets the divisor; "
        "0 = the data set's published number / clients",
        unit="records",
        least=0,
    )
    records_bound: int = _key(
        0,
        PRIVACY,
        "declared, public upper bound on them; 0 = 10 x records-per-client",
        unit="records",
        least=0,
    )
    l2_clip: float = _key(
        1.0,
        PRIVACY,
        "bound on the L2 norm of one record's gradient; with unit client on that of one client's update",
        least=0.0,
        exclusive=True,
    )
    steps_per_round: int = _key(2, PRIVACY, "local steps in each round a client joins", unit="steps", least=1)
    retries: int = _key(
        -1,
        PRIVACY,
        "extra charges after a crash, paid for in advance; -1 = one for every 20 rounds a client may join",
        unit="charges",
        least=-1,
    )
    multiplicity: int = _key(
        1,
        PRIVACY,
        "in how many clients' data sets one person may be; 1 = holders declare that nobody is in two",
        least=1,
    )
    persons: str = _key(
        "unstated",
        PRIVACY,
        "apart = you state that nobody in this data set is in another one whose ledgers the folder of ledgers holds; "
        "they record it, signed",
        choices=("unstated", "apart"),
    )
    metrics: str = _key(
        "",
        PRIVACY,
        "what clients say in each round about their own records, noised and charged: words of "
        f"{', '.join(Metric)}, separated by commas; empty = nothing",
    )
    metric_noise: float = _key(
        20.0,
        PRIVACY,
        "standard deviation of the noise on each of these sums, to which a record adds at most 1",
        least=0.0,
        exclusive=True,
    )
    metric_loss_bound: float = _key(
        5.0, PRIVACY, "a record's loss is clipped to it before it is summed", least=0.0, exclusive=True
    )
    views: int = _key(1, PRIVACY, "augmented views of a record, averaged before clipping", least=1)
    mode: str = _key(
        "auto",
        PRIVACY,
        "how per-example gradients are computed; changes speed only",
        choices=tuple(m.value for m in Mode),
    )
    physical_batch: int = _key(
        256, PRIVACY, "most examples in memory at a time; changes speed only", unit="records", least=1
    )

    client_rate: float = _key(
        0.2,
        CENTRAL,
        "probability with which a client takes part in a round, by a secret coin of its own (Poisson)",
        least=0.0,
        most=1.0,
        exclusive=True,
    )
    client_turns: int = _key(
        0,
        CENTRAL,
        "most rounds one client may take part in, which the noise is solved for; 0 = so many that one client in a "
        "thousand is held back",
        unit="rounds",
        least=0,
    )
    noise: str = _key(
        "independent",
        CENTRAL,
        "independent = fresh noise in every round, coins decide who takes part; banded = noise that largely cancels "
        "over the rounds, classes of clients take turns in public",
        choices=("independent", "banded"),
    )
    bands: int = _key(
        0,
        CENTRAL,
        "rounds over which the noise cancels, at most separation; needs noise banded; 0 = as many as may be",
        unit="rounds",
        least=0,
        most=MOST_BANDS,
    )
    separation: int = _key(
        0,
        CENTRAL,
        "rounds from one turn of a client to its next, and number of classes; needs noise banded; 0 = bands, or 5 "
        "where there are so many rounds and clients",
        unit="rounds",
        least=0,
    )
    clip_quantile: float = _key(
        0.0,
        CENTRAL,
        "share of the updates that the clip should leave whole: it then follows them, privately; 0 = l2-clip stays",
        least=0.0,
        most=0.99,
    )
    clip_lr: float = _key(
        0.2,
        CENTRAL,
        "how fast the clip follows; needs clip-quantile",
        least=0.0,
        most=1.0,
        exclusive=True,
    )
    bit_noise: float = _key(
        0.0,
        CENTRAL,
        "standard deviation of the noise on the number of updates within the clip; 0 = a twentieth of the expected "
        "cohort, at least twice the noise multiplier; needs clip-quantile",
        unit="clients",
        least=0.0,
    )

    optimizer: str = _key("sgd", LEARNING, "local optimiser", choices=tuple(o.value for o in Optimizer))
    lr: float = _key(1.5, LEARNING, "local learning rate", least=0.0, exclusive=True)
    momentum: float = _key(0.0, LEARNING, "momentum of SGD, or beta1 of Adam", least=0.0, most=0.999)
    weight_decay: float = _key(0.0, LEARNING, "pull of the weights towards zero", least=0.0)
    schedule: str = _key(
        "constant",
        LEARNING,
        "learning rate over the rounds",
        choices=("constant", "cosine", "linear", "step"),
    )
    warmup_rounds: int = _key(0, LEARNING, "rounds over which the learning rate rises", unit="rounds", least=0)
    proximal_mu: float = _key(
        0.0, LEARNING, "pull towards the round's starting model; needs strategy fedprox", least=0.0
    )

    strategy: str = _key(
        "fedavg", SERVER, "how updates become a model", choices=("fedavg", "fedavgm", "fedadam", "fedprox")
    )
    server_lr: float = _key(
        0.0, SERVER, "server learning rate; 0 = the strategy's own (fedavgm 1.0, fedadam 0.1)", least=0.0
    )
    server_momentum: float = _key(0.9, SERVER, "server momentum of fedavgm, or beta1 of fedadam", least=0.0, most=0.999)
    weights: str = _key(
        "uniform",
        SERVER,
        "weight of a client's update: equal, or by declared-sizes; never by a private count",
        choices=("uniform", "declared"),
    )
    declared_sizes: str = _key(
        "", SERVER, "public sizes, one whole number per client, separated by commas; needs weights declared"
    )
    evaluate_every: int = _key(
        1, SERVER, "rounds between two evaluations on the server's public test set", unit="rounds", least=1
    )
    min_replies: int = _key(
        0,
        SERVER,
        "fewest updates that make a round; with fewer the model stays; 0 = half the cohort",
        least=0,
    )
    round_timeout: float = _key(
        0.0, SERVER, "longest wait for a cohort's replies; 0 = no limit", unit="seconds", least=0.0
    )

    partition: str = _key(
        "iid",
        DATA,
        "iid, by skewed labels, by skewed sizes, by the data's own key, or virtual: synthetic records",
        choices=("iid", "dirichlet", "quantity", "natural", "virtual"),
    )
    alpha: float = _key(
        0.5, DATA, "evenness of a dirichlet or quantity partition: small is skewed", least=0.0, exclusive=True
    )

    engine: str = _key("local", MACHINE, "local = in this process; ray = Flower's simulation", choices=("local", "ray"))
    workers: int = _key(1, MACHINE, "worker processes of the local engine; 1 = none beside this one", least=1)
    threads: int = _key(1, MACHINE, "threads of each worker", least=1)
    device: str = _key("auto", MACHINE, "auto, cpu, cuda or cuda:N")
    vault: str = _key(
        "", MACHINE, "keyring (tacit vault keygen) that checkpoints, kept releases and keys are sealed for"
    )

    ledgers: str = _key(
        "", FOLDERS, "folder of ledgers that runs share, and that refuse together; empty = in the run folder"
    )
    out: str = _key("", FOLDERS, "run folder to create; empty = a new one under runs/")

    def __post_init__(self) -> None:
        for key in KEYS:
            # Frozen: the one way to store 3 as 3.0, so that equal scenarios have equal text.
            object.__setattr__(self, key.field, key.read(getattr(self, key.field)))
        self.validate()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> Self:
        """Reads a resolved scenario, exactly as `to_mapping` wrote it.

        Args:
            mapping: Flat, kebab-case; a missing key has its default.

        Raises:
            PlanError: A key is unknown, or the values are no scenario.
        """
        return cls(**_fields(_known(mapping, "the scenario")))

    @classmethod
    def from_run_config(cls, mapping: Mapping[str, object], defaults: Mapping[str, Value]) -> Self:
        """Reads Flower's run configuration, where every key is present and none says who set it.

        A value that equals the key's default counts as not set, so that the task's own defaults apply.

        Args:
            mapping: Flat, kebab-case, as in ``context.run_config``.
            defaults: The task's own defaults.

        Raises:
            PlanError: A key is unknown, or the values are no scenario.
        """
        given = {
            name: value
            for name, value in _known(mapping, "the run configuration").items()
            if value != BY_NAME[name].default
        }
        return cls.merge(defaults, {}, given)

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Reads a scenario file over its task's defaults.

        Raises:
            PlanError: The file does not parse, holds an unknown key, or is no scenario.
        """
        return cls.layered(path, {})

    @classmethod
    def layered(cls, path: Path | None, flags: Mapping[str, object]) -> Self:
        """Lays flags over a scenario file over the defaults of the task that they name.

        Args:
            path: Scenario file, or None.
            flags: Kebab-case keys that the command line gives, and no others.

        Raises:
            PlanError: The task is unknown, or the layers make no scenario.
        """
        file = read_toml(path) if path is not None else {}
        given = file | _known(flags, "the command line")
        # Only now: a mistyped flag is refused at once, not after PyTorch has loaded.
        from models.catalog import find_task

        name = given.get("task", BY_NAME["task"].default)
        try:
            task = find_task(str(name))
        except LookupError as error:
            raise PlanError(str(error.args[0] if error.args else error)) from None
        return cls.merge(task.defaults, file, flags)

    @classmethod
    def merge(cls, task: Mapping[str, object], file: Mapping[str, object], flags: Mapping[str, object]) -> Self:
        """Lays flags over a file over a task's defaults over the defaults of the keys.

        Only the file and the flags count as *given*. A given key that another choice makes idle is refused,
        while a task's default that becomes idle is dropped: ``--noise-multiplier 1`` replaces a default
        epsilon, and is refused beside a given one.

        Args:
            task: The task's own defaults, flat and kebab-case.
            file: What the scenario file says.
            flags: What the command line says.

        Raises:
            PlanError: A key is unknown, or given keys contradict each other.
        """
        given = _known(file, "the scenario file") | _known(flags, "the command line")
        values = {key.name: key.default for key in KEYS} | _known(task, "the task's defaults") | given
        for name, other in (("epsilon", "noise-multiplier"), ("noise-multiplier", "epsilon")):
            if given.get(name) and other not in given:
                values[other] = 0.0
        for rule in _RULES:
            if rule.applies(values):
                continue
            if rule.name in given:
                raise PlanError(f"expected {rule.name} only with {rule.needs}, got {rule.got(values)}; {rule.remedy}")
            values[rule.name] = BY_NAME[rule.name].default
        return cls(**_fields(values))

    def to_mapping(self) -> dict[str, Value]:
        """Returns all keys and values, flat and kebab-case: text, whole numbers and floats only."""
        return {key.name: getattr(self, key.field) for key in KEYS}

    def save(self, folder: Path) -> None:
        """Writes the scenario into a run folder."""
        write_whole(folder / CONFIG_FILE, json.dumps(self.to_mapping(), indent=2).encode() + b"\n")

    @classmethod
    def from_run(cls, folder: Path) -> Self:
        """Reads the scenario of a run folder.

        Raises:
            RunError: The folder holds no readable scenario.
        """
        path = folder / CONFIG_FILE
        try:
            mapping = json.loads(path.read_text())
        except OSError as error:
            raise RunError(
                f"expected a run folder with {CONFIG_FILE}, got {folder} ({error.strerror}); "
                "name a folder that 'tacit simulate' made"
            ) from None
        except ValueError:
            raise RunError(
                f"expected {path} to hold a scenario as JSON, got text that does not parse; restore it"
            ) from None
        if not isinstance(mapping, dict):
            raise RunError(f"expected {path} to hold a JSON object, got {type(mapping).__name__}; restore it")
        return cls.from_mapping(mapping)

    def validate(self) -> None:
        """Refuses values that are legal one by one and cannot mean anything together.

        Raises:
            PlanError: The first contradiction found, in one sentence.
        """
        values = self.to_mapping()
        self._validate_privacy()
        require(
            self.cohort <= self.clients,
            f"expected cohort <= clients, got cohort={self.cohort} of {self.clients} clients; 0 asks all",
        )
        require(
            self.min_replies <= (self.cohort or self.clients),
            f"expected min-replies <= cohort, got {self.min_replies} > {self.cohort or self.clients}",
        )
        require(
            self.warmup_rounds <= self.rounds,
            f"expected warmup-rounds <= rounds, got {self.warmup_rounds} > {self.rounds}",
        )
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"expected device to be auto, cpu, cuda or cuda:N, got {self.device!r}",
        )
        for rule in _RULES:
            if not rule.applies(values) and values[rule.name] != BY_NAME[rule.name].default:
                raise PlanError(f"expected {rule.name} only with {rule.needs}, got {rule.got(values)}; {rule.remedy}")
        require(
            self.strategy != "fedprox" or self.proximal_mu > 0,
            "expected proximal-mu with strategy fedprox, it is missing; add proximal-mu, 0.01 is customary",
        )
        for key in ("metric-noise", "metric-loss-bound"):
            require(
                self.asked_metrics is not None or values[key] == BY_NAME[key].default,
                f"expected {key} only with metrics, got {key}={values[key]} without; drop it or add --metrics accuracy",
            )
        self._validate_sizes()

    def _validate_privacy(self) -> None:
        if self.noise_multiplier > 0:
            require(
                self.epsilon == 0,
                f"expected epsilon or noise-multiplier, got both (epsilon={self.epsilon:g}, "
                f"noise-multiplier={self.noise_multiplier:g}); drop one; epsilon=0 follows from the noise",
            )
        else:
            require(
                self.epsilon > 0,
                f"expected epsilon > 0, got epsilon={self.epsilon:g}; there is no training without noise",
            )
        require(self.delta < 1, f"expected 0 < delta < 1, got delta={self.delta:g}; 1e-5 is customary")
        require(
            self.multiplicity <= self.clients,
            f"expected multiplicity <= clients, got {self.multiplicity} > {self.clients}",
        )
        bound = self.records_bound or 10 * self.records_per_client
        if self.records_bound:
            require(
                self.records_per_client <= self.records_bound,
                f"expected records-per-client <= records-bound, got {self.records_per_client} > "
                f"{self.records_bound}; raise the bound",
            )
        if bound:
            check_delta(self.delta, bound)
        if self.unit == Unit.CLIENT:
            check_delta(self.delta, self.clients, "clients")
            require(
                self.client_turns <= self.rounds,
                f"expected client-turns <= rounds, got {self.client_turns} > {self.rounds}; 0 fits it to the rounds",
            )
        self._validate_bands()
        for name in ("clip-lr", "bit-noise"):
            value = getattr(self, BY_NAME[name].field)
            require(
                self.clip_quantile > 0 or value == BY_NAME[name].default,
                f"expected {name} only with a clip-quantile, got {name}={value:g} without; drop it or add one",
            )

    def _validate_bands(self) -> None:
        require(
            self.separation <= self.clients,
            f"expected separation <= clients, got {self.separation} > {self.clients}; a class needs a client",
        )
        most = min(self.separation or self.clients, self.rounds)
        require(
            self.bands <= most,
            f"expected bands <= {'separation' if most == self.separation else 'rounds and clients'} = {most}, got "
            f"{self.bands}; a client's turns may share no row: use fewer, or a larger separation",
        )

    @property
    def asked_metrics(self) -> Metrics | None:
        """The metrics that clients are asked for, or None.

        Raises:
            PlanError: A word is not on the list, or stands there twice.
        """
        names = [word.strip() for word in self.metrics.split(",") if word.strip()]
        known = tuple(word.value for word in Metric)
        for name in names:
            require(
                name in known,
                f"expected metrics among {', '.join(known)}, got {name!r:.40}{nearest(name, known)}",
            )
        require(len(set(names)) == len(names), f"expected each metric once, got {self.metrics!r:.80}; drop one")
        words = tuple(word for word in Metric if word in names)
        return Metrics(words=words, noise=self.metric_noise, loss_bound=self.metric_loss_bound) if words else None

    def _validate_sizes(self) -> None:
        if self.weights != "declared":
            return
        require(
            self.declared_sizes != "",
            "expected declared-sizes with weights declared, it is missing; add one public size per client",
        )
        sizes = self.sizes
        require(
            len(sizes) == self.clients,
            f"expected one declared size per client ({self.clients}), got {len(sizes)}; add or drop sizes",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The declared public sizes, one per client, each >= 1; () with uniform weights.

        Raises:
            PlanError: The text is no list of whole numbers >= 1.
        """
        try:
            sizes = tuple(int(word) for word in self.declared_sizes.split(",") if self.declared_sizes)
        except ValueError:
            sizes = (0,)
        require(
            all(size >= 1 for size in sizes),
            f"expected declared-sizes as whole numbers >= 1 separated by commas, got {self.declared_sizes!r}",
        )
        return sizes

    @property
    def server_rate(self) -> float:
        """The server's learning rate > 0: what is given, or the strategy's own."""
        return self.server_lr or (0.1 if self.strategy == "fedadam" else 1.0)

    def resolved(self, declared_records: int | None) -> Self:
        """Returns the scenario with every 'by itself' value replaced by its number.

        Args:
            declared_records: Published number of training records in the whole data set, or None where nobody
                published one. Never a count of private records.

        Raises:
            PlanError: The number of records is neither published nor declared, or delta is too large for it.
        """
        per_client = self.records_per_client
        if not per_client:
            require(
                declared_records is not None,
                "expected records-per-client, because nobody published the number of records of this data; "
                "declare a public number, it sets the divisor",
            )
            per_client = max(1, (declared_records or 0) // self.clients)
        if self.unit == Unit.CLIENT:
            return self._resolved_central(per_client)
        cohort = self.cohort or self.clients
        # As often as the server's turns come round to one client (server.app.joins_of; a test holds the two equal).
        turns = self.rounds if cohort >= self.clients else math.ceil(self.rounds / (self.clients // cohort))
        return dataclasses.replace(
            self,
            cohort=cohort,
            records_per_client=per_client,
            records_bound=self.records_bound or 10 * per_client,
            retries=self.retries if self.retries >= 0 else max(1, math.ceil(turns / 20)),
            min_replies=self.min_replies or max(1, cohort // 2),
            server_lr=self.server_rate if self.strategy in ("fedavgm", "fedadam") else 0.0,
        )

    def _resolved_central(self, per_client: int) -> Self:
        if self.noise == "banded":
            separation = self.separation or self.bands or min(5, self.rounds, self.clients)
            return dataclasses.replace(
                self,
                records_per_client=per_client,
                records_bound=self.records_bound or 10 * per_client,
                separation=separation,
                bands=self.bands or min(separation, self.rounds, MOST_BANDS),
                server_lr=self.server_rate if self.strategy in ("fedavgm", "fedadam") else 0.0,
            )
        # Imported here, because it needs NumPy and a page of help does not.
        from privacy.central import turns_of

        turns = self.client_turns or turns_of(self.rounds, self.client_rate)
        return dataclasses.replace(
            self,
            records_per_client=per_client,
            records_bound=self.records_bound or 10 * per_client,
            client_turns=turns,
            retries=self.retries if self.retries >= 0 else max(1, math.ceil(turns / 20)),
            server_lr=self.server_rate if self.strategy in ("fedavgm", "fedadam") else 0.0,
        )


def _describe() -> tuple[Key, ...]:
    return tuple(
        Key(name=field.name.replace("_", "-"), **{"default": field.default, **field.metadata})
        for field in dataclasses.fields(Scenario)
    )


KEYS: Final = _describe()
BY_NAME: Final[Mapping[str, Key]] = {key.name: key for key in KEYS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    """A key that means something only beside another choice."""

    name: str
    on: str
    words: tuple[Value, ...]
    remedy: str

    @property
    def needs(self) -> str:
        return f"{self.on} {' or '.join(str(word) for word in self.words)}"

    def applies(self, values: Mapping[str, Value]) -> bool:
        return values[self.on] in self.words

    def got(self, values: Mapping[str, Value]) -> str:
        return f"{self.name}={values[self.name]} with {self.on}={values[self.on]}"


_CLIPS: Final = ("clip-quantile", "clip-lr", "bit-noise")
_RULES: Final = (
    _Rule(
        name="alpha",
        on="partition",
        words=("dirichlet", "quantity"),
        remedy="drop alpha or choose such a partition",
    ),
    _Rule(name="declared-sizes", on="weights", words=("declared",), remedy="drop it or add weights declared"),
    _Rule(name="proximal-mu", on="strategy", words=("fedprox",), remedy="drop it or add strategy fedprox"),
    _Rule(
        name="server-lr",
        on="strategy",
        words=("fedavgm", "fedadam"),
        remedy="drop it or choose such a strategy",
    ),
    _Rule(
        name="server-momentum",
        on="strategy",
        words=("fedavgm", "fedadam"),
        remedy="drop it or choose such a strategy",
    ),
    _Rule(name="workers", on="engine", words=("local",), remedy="drop it: Ray starts its own workers"),
    *(
        _Rule(name=name, on="unit", words=("client",), remedy="drop it or add unit client")
        for name in ("client-rate", "client-turns", "noise", "bands", "separation", *_CLIPS)
    ),
    *(
        _Rule(name=name, on="noise", words=("banded",), remedy="drop it or add noise banded")
        for name in ("bands", "separation")
    ),
    *(
        _Rule(name=name, on="noise", words=("independent",), remedy="drop it: the separation says whose turn it is")
        for name in ("client-rate", "client-turns")
    ),
    *(
        _Rule(name=name, on="noise", words=("independent",), remedy="drop it: a matrix has one clip for all its rounds")
        for name in _CLIPS
    ),
    _Rule(name="metrics", on="unit", words=("record",), remedy="drop it: a record's bound is none for a client"),
    _Rule(name="retries", on="noise", words=("independent",), remedy="drop it: a row of a matrix is joined once"),
    _Rule(name="cohort", on="unit", words=("record",), remedy="drop it: coins at the client-rate draw a cohort"),
    _Rule(name="min-replies", on="unit", words=("record",), remedy="drop it: a thin round counts like any other"),
    _Rule(name="weights", on="unit", words=("record",), remedy="drop it: one client may weigh no more than another"),
    # In one sum a person in several clients moves it several times: their ledgers' figures do not add up to that.
    _Rule(name="multiplicity", on="unit", words=("record",), remedy="drop it: no figure covers a person in several"),
    _Rule(name="views", on="unit", words=("record",), remedy="drop it: training at a client is plain"),
    _Rule(name="mode", on="unit", words=("record",), remedy="drop it: training at a client is plain"),
)


def read_toml(path: Path) -> dict[str, Value]:
    """Reads the keys that a scenario file gives, whatever tables they are grouped in.

    A file that states epsilon must state delta: one without the other says nothing, and a file is read by
    people who do not see the defaults.

    Args:
        path: TOML file; table names are free, keys are scenario keys.

    Raises:
        PlanError: The file cannot be read or parsed, or holds an unknown or repeated key.
    """
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise PlanError(f"expected a scenario file, got {path} ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"expected {path} to be TOML, got {error}; check that line") from None
    flat: dict[str, object] = {}
    _flatten(document, flat, path)
    values = _known(flat, str(path))
    require(
        "epsilon" not in values or "delta" in values,
        f"expected delta beside epsilon in {path}, it is missing; add delta, 1e-5 is customary",
    )
    return values


def _flatten(table: Mapping[str, object], into: dict[str, object], path: Path) -> None:
    for name, value in table.items():
        if isinstance(value, dict):
            _flatten(value, into, path)
            continue
        require(name not in into, f"expected {name} once in {path}, got it in two tables; keep one")
        into[name] = value


def _known(mapping: Mapping[str, object], where: str) -> dict[str, Value]:
    """Reads each value, after refusing the first unknown name with the nearest valid one."""
    for name in mapping:
        require(
            name in BY_NAME,
            f"expected only scenario keys in {where}, got {name!r}{nearest(name, tuple(BY_NAME))}",
        )
    return {name: BY_NAME[name].read(value) for name, value in mapping.items()}


def _fields(values: Mapping[str, Value]) -> dict[str, Any]:
    return {BY_NAME[name].field: value for name, value in values.items()}


def nearest(word: str, words: tuple[str, ...], page: str = "tacit simulate --help") -> str:
    """Returns the end of a refusal: the valid name closest to ``word``, or the page that lists them all."""
    near = difflib.get_close_matches(word.replace("_", "-").lower(), words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; '{page}' lists them"
