"""Tables with a public schema: CSV and Parquet in, scaled and one-hot tensors out.

Whatever turns a cell into a number is written in the schema: bounds, categories and fills. Nothing is
measured on the records, because a mean or a maximum of private records is an uncharged release.

A schema is a TOML file::

    target = "outcome"            # the column to predict
    classes = ["well", "ill"]     # its values; their order is the order of the classes
    records = 800                 # public number of training records, where one is documented
    client = "hospital"           # optional: the column whose values are the natural clients
    test-fraction = 0.2           # optional: used by a simulation where there is no test file

    [columns.age]
    kind = "number"               # clipped to the bounds and scaled to [-1, 1]: one input
    min = 0
    max = 120
    missing = 50                  # optional: fill for missing cells; a second input is 1 where filled

    [columns.ward]
    kind = "category"             # one-hot: an input for each value
    values = ["a", "b"]
    other = true                  # optional: one more input, for unknown and missing values

    [columns.note]
    kind = "ignored"
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clients.places import Place, stream_of
from clients.records import Records
from models.shape import Shape
from privacy.errors import DataError

Cells = Sequence[object]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

SUFFIXES = (".csv", ".parquet")

# A Parquet file of a few kilobytes may claim billions of rows; 2**28 cells are 1 GB of float32.
_MOST_CELLS = 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
    """A numeric column with public bounds, and a public fill where missing cells are legal."""

    low: float
    high: float
    missing: float | None = None

    @property
    def width(self) -> int:
        """Number of inputs it becomes."""
        return 1 if self.missing is None else 2

    def encode(self, cells: Cells) -> tuple[Floats, Flags]:
        """Returns inputs ``(N, width)`` in [-1, 1] and which cells were legal, ``(N,)``."""
        gaps = np.fromiter((_is_missing(cell) for cell in cells), np.bool_, len(cells))
        values = np.fromiter((_number(cell) for cell in cells), np.float64, len(cells))
        if self.missing is None:
            good = np.isfinite(values)
        else:
            good = np.isfinite(values) | gaps
            values = np.where(gaps, self.missing, values)
        scaled = 2 * (np.clip(values, self.low, self.high) - self.low) / (self.high - self.low) - 1
        columns = [scaled] if self.missing is None else [scaled, gaps.astype(np.float64)]
        return np.stack(columns, axis=1), good

    def wanted(self) -> str:
        """Says what a legal cell is."""
        return "a finite number" + ("" if self.missing is None else " or an empty cell")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category:
    """A column with a public list of values, and where unknown ones are legal a slot for them."""

    values: tuple[str, ...]
    other: bool = False

    @property
    def width(self) -> int:
        """Number of inputs it becomes."""
        return len(self.values) + self.other

    def encode(self, cells: Cells) -> tuple[Floats, Flags]:
        """Returns one-hot inputs ``(N, width)`` and which cells were legal, ``(N,)``."""
        codes = _codes(cells, self.values)
        known = codes >= 0
        hot = np.zeros((len(cells), self.width))
        slots = np.where(known, codes, len(self.values))
        good = known | self.other
        hot[np.flatnonzero(good), slots[good]] = 1
        return hot, good

    def wanted(self) -> str:
        """Says what a legal cell is."""
        return f"one of {', '.join(self.values)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """The public description of a table.

    Attributes:
        columns: Input columns by name, in the order of the inputs.
        ignored: Columns that may be there and are not read.
        target: Name of the column to predict.
        classes: Its values, in the order of the classes.
        client: Name of the column with the natural client, or None.
        records: Public number of training records, or None where nobody declared it.
        test_fraction: Share of the records that a simulation sets aside for testing, in (0, 1), or None.
    """

    columns: Mapping[str, Number | Category]
    ignored: tuple[str, ...] = ()
    target: str
    classes: tuple[str, ...]
    client: str | None = None
    records: int | None = None
    test_fraction: float | None = None

    @property
    def shape(self) -> Shape:
        """Public shape of the records."""
        return Shape(inputs=(sum(column.width for column in self.columns.values()),), classes=len(self.classes))

    def required(self) -> dict[str, str]:
        """Returns what each column that must be there holds, in words."""
        roles = {
            name: "numbers" if isinstance(column, Number) else "categories" for name, column in self.columns.items()
        }
        roles[self.target] = "the target"
        if self.client is not None:
            roles[self.client] = "the client"
        return roles


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """One file's records as tensors and, where the schema names a client column, each record's client.
    Secret."""

    records: Records
    clients: tuple[str, ...] | None = dataclasses.field(default=None, repr=False)


def read_schema(path: Place) -> Schema:
    """Reads a schema from a TOML file.

    Raises:
        DataError: The file cannot be read, or a key is unknown, missing or contradicts another.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"expected a schema at {path}, got {error.strerror}; write a schema.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"expected {path} to be TOML, got {error}") from error
    return parse_schema(content, str(path))


def parse_schema(content: Mapping[str, Any], where: str) -> Schema:
    """Checks a schema as TOML gives it.

    Args:
        content: The parsed document.
        where: Its name in error messages.

    Raises:
        DataError: A key is unknown, missing or contradicts another; the sentence names it.
    """
    _known(content, ("target", "classes", "client", "records", "test-fraction", "columns"), where)
    target = _text(content, "target", where)
    classes = _texts(content, "classes", where)
    client = _text(content, "client", where) if "client" in content else None
    if len(classes) < 2:
        raise DataError(f"{where}: expected at least two classes, got {len(classes)}; list every value of the target")
    records = content.get("records")
    if records is not None and (not isinstance(records, int) or isinstance(records, bool) or records < 1):
        raise DataError(f"{where}: expected records to be a whole number >= 1, got {records!r}")
    fraction = content.get("test-fraction")
    if fraction is not None and not (isinstance(fraction, float) and 0 < fraction < 1):
        raise DataError(f"{where}: expected 0 < test-fraction < 1, got {fraction!r}")
    tables = content.get("columns")
    if not isinstance(tables, dict) or not tables:
        raise DataError(f"{where}: expected a [columns.NAME] table for each input column, got none")
    columns: dict[str, Number | Category] = {}
    ignored = []
    for name, table in tables.items():
        place = f"{where}, column {name!r}"
        if name in (target, client):
            raise DataError(
                f"{place}: expected an input column, got the {'target' if name == target else 'client'}; "
                "leave it out of [columns]"
            )
        column = _column(table, place)
        if column is None:
            ignored.append(name)
        else:
            columns[name] = column
    if not columns:
        raise DataError(f"{where}: expected at least one number or category column, got only ignored ones")
    return Schema(
        columns=columns,
        ignored=tuple(ignored),
        target=target,
        classes=classes,
        client=client,
        records=records,
        test_fraction=fraction,
    )


def read_table(path: Place, schema: Schema, *, strict: bool) -> Table:
    """Reads a CSV or Parquet file by its schema.

    Args:
        path: The file, sealed or not; CSV is UTF-8 with a header line.
        schema: What it must hold.
        strict: Whether a bad record is an error (a simulation) or marked invalid (a data holder, guarantee
            G12).

    Raises:
        DataError: The file cannot be read, its columns are not the schema's (the sentence names the column),
            or, if strict, a cell is not what its column holds.
    """
    try:
        columns, whole = _read_csv(path, strict) if path.suffix == ".csv" else _read_parquet(path, schema)
    except OSError as error:
        raise DataError(f"expected a table at {path}, got {error.strerror or error}") from error
    return encode(columns, schema, where=str(path), strict=strict, whole=whole)


def read_cells(path: Place, schema: Schema) -> Mapping[str, Cells]:
    """Returns a file's columns as they stand there; the target's need not be among them.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        return (_read_csv(path, strict=True) if path.suffix == ".csv" else _read_parquet(path, schema))[0]
    except OSError as error:
        raise DataError(f"expected a table at {path}, got {error.strerror or error}") from error


def encode(
    cells: Mapping[str, Cells], schema: Schema, *, where: str, strict: bool, whole: Flags | None = None
) -> Table:
    """Turns columns of cells into records.

    Args:
        cells: Columns by name, all of one length N.
        schema: What they must hold.
        where: Their name in error messages.
        strict: Whether a bad record is an error or marked invalid.
        whole: Rows that were read whole, shape ``(N,)``; the others are invalid.

    Raises:
        DataError: As `read_table`.
    """
    _check_columns(cells, schema, where)
    count = len(cells[schema.target])
    valid = np.ones(count, dtype=np.bool_) if whole is None else whole.copy()

    def check(name: str, good: Flags, wanted: str) -> None:
        if strict and not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise DataError(
                f"{where}, record {row + 1}, column {name!r}: expected {wanted}, got {cells[name][row]!r}; "
                "correct the "
                "file or the schema"
            )
        valid[~good] = False

    blocks = []
    for name, column in schema.columns.items():
        block, good = column.encode(cells[name])
        check(name, good, column.wanted())
        blocks.append(block)
    targets = _codes(cells[schema.target], schema.classes)
    check(schema.target, targets >= 0, f"one of the classes {', '.join(schema.classes)}")
    clients = None
    if schema.client is not None:
        names = cells[schema.client]
        check(
            schema.client,
            np.array([not _is_missing(cell) for cell in names], dtype=np.bool_),
            "a client's name",
        )
        clients = tuple(_word(cell) for cell in names)
    inputs = np.concatenate(blocks, axis=1)
    # An unreadable record becomes an all-zero one, so that nothing downstream can stumble over its content.
    inputs[~valid] = 0
    targets[~valid] = 0
    records = Records(torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets), torch.from_numpy(valid))
    return Table(records=records, clients=clients)


def _column(table: object, place: str) -> Number | Category | None:
    """One column of a schema; None where it is ignored."""
    if not isinstance(table, dict):
        raise DataError(f'{place}: expected a table such as {{kind = "number", min = 0, max = 1}}, got {table!r}')
    kind = table.get("kind")
    if kind == "number":
        _known(table, ("kind", "min", "max", "missing"), place)
        low, high = _bound(table, "min", place), _bound(table, "max", place)
        if not low < high:
            raise DataError(f"{place}: expected min < max, got min={low} and max={high}")
        missing = _bound(table, "missing", place) if "missing" in table else None
        if missing is not None and not low <= missing <= high:
            raise DataError(f"{place}: expected the fill {missing} for missing cells to lie in [{low}, {high}]")
        return Number(low=low, high=high, missing=missing)
    if kind == "category":
        _known(table, ("kind", "values", "other"), place)
        other = table.get("other", False)
        if not isinstance(other, bool):
            raise DataError(f"{place}: expected other = true or false, got {other!r}")
        return Category(values=_texts(table, "values", place), other=other)
    if kind == "ignored":
        _known(table, ("kind",), place)
        return None
    raise DataError(f'{place}: expected kind = "number", "category" or "ignored", got {kind!r}')


def _known(content: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Refuses keys that a schema does not have."""
    for key in content:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise DataError(f"{where}: expected only known keys, got {key!r}; {hint}")


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: expected {key} to be a column's name, got {value!r}")
    return value


def _texts(content: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = content.get(key)
    if not isinstance(values, list) or not values:
        raise DataError(f"{where}: expected {key} to be a list of values, got {values!r}")
    words = tuple(_word(value) for value in values)
    if len(set(words)) < len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise DataError(f"{where}: expected {key} to name every value once, got {twice!r} twice")
    return words


def _bound(table: Mapping[str, Any], key: str, place: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: expected {key} to be a finite number that is public, got {value!r}")
    return float(value)


def _check_columns(cells: Mapping[str, Cells], schema: Schema, where: str) -> None:
    """Refuses a table whose columns are not the schema's, naming the first that differs."""
    required = schema.required()
    unknown = [name for name in cells if name not in required and name not in schema.ignored]
    for name, role in required.items():
        if name not in cells:
            near = difflib.get_close_matches(name, unknown, 1)
            hint = f"rename its column {near[0]!r}" if near else "add it, or change the schema for all clients"
            raise DataError(f"{where}: expected a column {name!r} with {role}, got no such column; {hint}")
    if unknown:
        raise DataError(
            f"{where}: expected only the schema's columns, got {unknown[0]!r} as well; describe it in the "
            "schema, "
            'as kind = "ignored" if it is not to be used'
        )


def _is_missing(cell: object) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def _number(cell: object) -> float:
    """A cell as a float, NaN where it is none."""
    try:
        return float(cell)  # type: ignore[arg-type]  # Whatever is no number raises, which is the question asked.
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _word(cell: object) -> str:
    """A cell as a category's name, alike in CSV and Parquet: true, 3 and text."""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # A whole-number column with gaps arrives from Parquet as floats.
    return "" if _is_missing(cell) else str(cell)


def _codes(cells: Cells, words: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """The position of each cell among words, -1 where it is not there."""
    places = {word: place for place, word in enumerate(words)}
    return np.fromiter((places.get(_word(cell), -1) for cell in cells), np.int64, len(cells))


def _read_csv(path: Place, strict: bool) -> tuple[dict[str, Cells], Flags]:
    """A CSV file's columns, and which rows had as many cells as the header."""
    rows: list[list[str]] = []
    whole: list[bool] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            if header is None:
                raise DataError(f"{path}: expected a header line with the schema's columns, got an empty file")
            for row in reader:
                if not row:
                    continue  # A blank line is not a record.
                if len(row) != len(header):
                    if strict:
                        raise DataError(
                            f"{path}, line {reader.line_num}: expected {len(header)} cells as in the header, "
                            f"got {len(row)}; quote cells that hold commas"
                        )
                    row = [""] * len(header)
                    whole.append(False)
                else:
                    whole.append(True)
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected CSV in UTF-8, got {error}; export the file anew") from error
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path}: expected every column once, got {twice!r} twice")
    columns: dict[str, Cells] = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    return columns, np.array(whole, dtype=np.bool_)


def _read_parquet(path: Place, schema: Schema) -> tuple[dict[str, Cells], None]:
    """A Parquet file's columns; only those that the schema reads are decoded."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"expected pyarrow to read {path}, got {error}; install pyarrow, or export CSV") from error
    try:
        file = pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else stream_of(path))
        names = file.schema_arrow.names
        if file.metadata.num_rows * max(1, len(names)) > _MOST_CELLS:
            raise DataError(
                f"{path}: expected at most {_MOST_CELLS} cells, got {file.metadata.num_rows} rows of "
                f"{len(names)}; "
                "split the file"
            )
        for name, column in schema.columns.items():
            kind = file.schema_arrow.field(name).type if name in names else None
            if kind is not None and isinstance(column, Number) and not _numeric(pyarrow.types, kind):
                raise DataError(f"{path}: expected column {name!r} to hold numbers, got {kind}; convert it")
        wanted = [name for name in names if name not in schema.ignored]
        table = file.read(columns=wanted)
    except (pyarrow.ArrowException, EOFError) as error:
        raise DataError(f"{path}: expected a Parquet file, got {error}; export the file anew") from error
    return {name: table.column(name).to_pylist() for name in wanted}, None


def _numeric(types: Any, kind: Any) -> bool:
    return bool(
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    )
