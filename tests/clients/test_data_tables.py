"""Tables: schemas, CSV and Parquet, natural clients, mismatches."""

import pyarrow
import pyarrow.parquet
import pytest
import torch

from clients.data import load_source
from clients.tables import encode, parse_schema, read_schema, read_table
from models.catalog import TASKS
from privacy.errors import DataError

SCHEMA = """
target = "outcome"
classes = ["well", "ill"]
records = 40

[columns.age]
kind = "number"
min = 0
max = 100
missing = 50

[columns.dose]
kind = "number"
min = -1.0
max = 1.0

[columns.ward]
kind = "category"
values = ["a", "b"]
other = true

[columns.smokes]
kind = "category"
values = ["true", "false"]

[columns.note]
kind = "ignored"
"""
HEADER = "age,dose,ward,smokes,outcome"
ROWS = ["25,0.5,a,true,well", "150,-1,b,false,ill", ",0,zzz,true,ill"]
# age (2 inputs), dose (1), ward (2 and other), smokes (2)
ENCODED = [
    [-0.5, 0, 0.5, 1, 0, 0, 1, 0],
    [1, 0, -1, 0, 1, 0, 0, 1],
    [0, 1, 0, 0, 0, 1, 1, 0],
]


def write(folder, files: dict[str, str]):
    for name, text in files.items():
        (folder / name).write_text(text)
    return str(folder)


def table(*rows: str, header: str = HEADER) -> str:
    return "\n".join((header, *rows)) + "\n"


def columns(*rows: str) -> dict[str, list]:
    return dict(zip(HEADER.split(","), (list(c) for c in zip(*(r.split(",") for r in rows), strict=True)), strict=True))


def test_a_csv_is_clipped_scaled_and_one_hot_by_the_schema_alone(tmp_path):
    data = write(tmp_path, {"schema.toml": SCHEMA, "train.csv": table(*ROWS), "test.csv": table(ROWS[0])})
    source = load_source(TASKS["table"], data=data)
    torch.testing.assert_close(source.train.inputs, torch.tensor(ENCODED))
    assert source.train.targets.tolist() == [0, 1, 1]
    assert source.test.inputs.tolist() == [ENCODED[0]]
    assert source.declared_records == 40
    assert source.classes == ("well", "ill")


def test_a_schema_file_may_be_named_itself(tmp_path):
    write(tmp_path, {"schema.toml": SCHEMA, "train.csv": table(*ROWS), "test.csv": table(ROWS[0])})
    assert len(load_source(TASKS["table"], data=str(tmp_path / "schema.toml")).train) == 3


def test_what_a_record_becomes_does_not_depend_on_other_records():
    schema = parse_schema(read_toml(SCHEMA), "schema")
    alone = encode(columns(ROWS[0]), schema, where="t", strict=True).records
    among = encode(columns(*ROWS), schema, where="t", strict=True).records
    assert torch.equal(alone.inputs[0], among.inputs[0])


def read_toml(text: str) -> dict:
    import tomllib

    return tomllib.loads(text)


def test_parquet_and_csv_of_the_same_table_are_the_same(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "note": [object.__name__] * 3,
                "outcome": ["well", "ill", "ill"],
                "age": [25, 150, None],
                "dose": [0.5, -1.0, 0.0],
                "ward": ["a", "b", None],
                "smokes": [True, False, True],
            }
        ),
        tmp_path / "train.parquet",
    )
    data = write(tmp_path, {"schema.toml": SCHEMA, "test.csv": table(ROWS[0])})
    source = load_source(TASKS["table"], data=data)
    torch.testing.assert_close(source.train.inputs, torch.tensor(ENCODED))
    assert source.train.targets.tolist() == [0, 1, 1]


def test_categories_that_are_whole_numbers_survive_gaps_in_parquet(tmp_path):
    schema = parse_schema(
        {
            "target": "y",
            "classes": [0, 1],
            "columns": {"x": {"kind": "category", "values": [1, 2], "other": True}},
        },
        "s",
    )
    pyarrow.parquet.write_table(pyarrow.table({"x": [1.0, None, 2.0], "y": [0, 1, 1]}), tmp_path / "t.parquet")
    records = read_table(tmp_path / "t.parquet", schema, strict=True).records
    assert records.inputs.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (
            "old,0.5,a,true,well",
            "record 2, column 'age': expected a finite number or an empty cell, got 'old'",
        ),
        ("25,,a,true,well", "column 'dose': expected a finite number, got ''"),
        ("25,inf,a,true,well", "column 'dose'"),
        ("25,0.5,a,maybe,well", "column 'smokes': expected one of true, false, got 'maybe'"),
        ("25,0.5,a,true,dead", "column 'outcome': expected one of the classes well, ill, got 'dead'"),
        ("25,0.5,a,true", "line 3: expected 5 cells"),
    ],
)
def test_a_bad_cell_is_named_in_a_simulation_and_silent_at_a_holder(tmp_path, row, what):
    data = write(tmp_path, {"schema.toml": SCHEMA, "train.csv": table(ROWS[0], row), "test.csv": table(ROWS[0])})
    with pytest.raises(DataError, match=what):
        load_source(TASKS["table"], data=data)
    records = load_source(TASKS["table"], data=data, strict=False).train
    assert records.valid.tolist() == [True, False]
    assert records.inputs[1].abs().max() == 0
    assert records.targets[1] == 0


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (
            "age,dose,wards,smokes,outcome",
            "expected a column 'ward' with categories.*rename its column 'wards'",
        ),
        ("years,dose,ward,smokes,outcome", "expected a column 'age' with numbers, got no such column"),
        ("age,dose,ward,smokes,result", "expected a column 'outcome' with the target"),
        ("age,dose,ward,age,outcome", "'age' twice"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_column_that_differs_from_the_schema_is_named(tmp_path, header, what, strict):
    files = {"schema.toml": SCHEMA, "train.csv": table(ROWS[0], header=header), "test.csv": table(ROWS[0])}
    with pytest.raises(DataError, match=what):
        load_source(TASKS["table"], data=write(tmp_path, files), strict=strict)


def test_an_extra_column_is_refused_unless_it_is_declared_as_ignored(tmp_path):
    extra = table("x,25,0.5,a,true,well", header="salary," + HEADER)
    data = write(tmp_path, {"schema.toml": SCHEMA, "train.csv": extra, "test.csv": table(ROWS[0])})
    with pytest.raises(DataError, match="got 'salary' as well"):
        load_source(TASKS["table"], data=data)
    (tmp_path / "train.csv").write_text(extra.replace("salary", "note"))
    assert len(load_source(TASKS["table"], data=data).train) == 1


def test_each_file_is_a_client_where_there_is_no_training_file(tmp_path):
    files = {"site-b.csv": table(ROWS[1]), "site-a.csv": table(ROWS[0], ROWS[2]), "test.csv": table(ROWS[0])}
    source = load_source(TASKS["table"], data=write(tmp_path, files | {"schema.toml": SCHEMA}))
    assert source.key_names == ("site-a", "site-b")
    assert source.keys.tolist() == [0, 0, 1]
    assert source.train.targets.tolist() == [0, 1, 1]


def test_a_schema_mismatch_between_clients_names_the_file_and_the_column(tmp_path):
    other = table(ROWS[1], header=HEADER.replace("dose", "dosis"))
    files = {
        "schema.toml": SCHEMA,
        "site-a.csv": table(ROWS[0]),
        "site-b.csv": other,
        "test.csv": table(ROWS[0]),
    }
    with pytest.raises(DataError, match=r"site-b\.csv: expected a column 'dose'"):
        load_source(TASKS["table"], data=write(tmp_path, files))


def test_a_parquet_column_of_another_type_is_named(tmp_path):
    content = {"age": ["x"], "dose": [0.1], "ward": ["a"], "smokes": [True], "outcome": ["ill"]}
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "site-a.parquet")
    data = write(tmp_path, {"schema.toml": SCHEMA, "test.csv": table(ROWS[0])})
    with pytest.raises(DataError, match=r"site-a\.parquet: expected column 'age' to hold numbers, got string"):
        load_source(TASKS["table"], data=data)


def test_a_client_column_gives_the_natural_keys_and_a_test_file_may_have_it_or_not(tmp_path):
    schema = 'client = "hospital"\n' + SCHEMA
    train = table(*(f"{site},{row}" for site, row in zip("nmn", ROWS, strict=True)), header="hospital," + HEADER)
    files = {"schema.toml": schema, "train.csv": train, "test.csv": table(ROWS[0])}
    source = load_source(TASKS["table"], data=write(tmp_path, files))
    assert source.key_names == ("m", "n")
    assert source.keys.tolist() == [1, 0, 1]
    assert source.shape.inputs == (8,)
    (tmp_path / "test.csv").write_text(train)
    assert len(load_source(TASKS["table"], data=str(tmp_path)).test) == 3


def test_a_fraction_is_set_aside_in_a_simulation_and_nothing_at_a_holder(tmp_path):
    rows = [f"{age},0,a,true,well" for age in range(50)]
    files = {
        "schema.toml": "test-fraction = 0.2\n" + SCHEMA,
        "site-a.csv": table(*rows[:30]),
        "site-b.csv": table(*rows[30:]),
    }
    data = write(tmp_path, files)
    source = load_source(TASKS["table"], data=data)
    assert (len(source.train), len(source.test)) == (40, 10)
    ages = torch.cat([source.train.inputs, source.test.inputs])[:, 0]
    assert len(ages.unique()) == 50
    # The keys moved with their records: the first site's ages are below 30.
    assert torch.equal(source.keys, (source.train.inputs[:, 0] * 50 + 50 > 29.5).long())
    holder = load_source(TASKS["table"], data=data, strict=False)
    assert (len(holder.train), len(holder.test)) == (50, 0)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"train.csv": table(*ROWS)}, "test-fraction"),
        ({"test.csv": table(*ROWS)}, "got neither"),
        ({"train.csv": table(*ROWS), "site.csv": table(*ROWS)}, "got train and site.csv"),
        ({"train.csv": "", "test.csv": table(*ROWS)}, "empty file"),
        ({"train.parquet": "no parquet", "test.csv": table(*ROWS)}, "expected a Parquet file"),
        ({"train.csv": table(*ROWS), "train.parquet": "x"}, "got both"),
        ({"a.csv": table(*ROWS), "a.parquet": "x"}, "client 'a', got two"),
    ],
)
def test_a_folder_that_is_not_a_data_set_says_what_is_missing(tmp_path, files, what):
    with pytest.raises(DataError, match=what):
        load_source(TASKS["table"], data=write(tmp_path, {"schema.toml": SCHEMA} | files))


def test_a_folder_without_a_schema_says_so(tmp_path):
    with pytest.raises(DataError, match="expected a schema at"):
        load_source(TASKS["table"], data=str(tmp_path))


def test_a_file_in_another_encoding_is_refused(tmp_path):
    data = write(tmp_path, {"schema.toml": SCHEMA, "test.csv": table(*ROWS)})
    (tmp_path / "train.csv").write_bytes(table(*ROWS).encode() + b"\xff\xfe,1,a,true,well\n")
    with pytest.raises(DataError, match="CSV in UTF-8"):
        load_source(TASKS["table"], data=data)


def test_a_parquet_file_that_claims_too_much_is_refused_unread(tmp_path, monkeypatch):
    content = {
        "age": [1] * 50,
        "dose": [0.1] * 50,
        "ward": ["a"] * 50,
        "smokes": [True] * 50,
        "outcome": ["ill"] * 50,
    }
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "t.parquet")
    monkeypatch.setattr("clients.tables._MOST_CELLS", 200)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", lambda *_, **__: pytest.fail("read over the limit"))
    with pytest.raises(DataError, match="at most 200 cells"):
        read_table(tmp_path / "t.parquet", parse_schema(read_toml(SCHEMA), "s"), strict=True)


NUMBER = {"kind": "number", "min": 0, "max": 1}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"clases": ["a"]}, "did you mean 'classes'"),
        ({"target": 3}, "target to be a column's name"),
        ({"classes": ["a"]}, "at least two classes"),
        ({"classes": ["a", "a"]}, "'a' twice"),
        ({"classes": "ab"}, "classes to be a list"),
        ({"records": 0}, "records to be a whole number"),
        ({"records": True}, "records to be a whole number"),
        ({"test-fraction": 1.5}, "test-fraction"),
        ({"columns": {}}, r"a \[columns.NAME\] table"),
        ({"columns": {"x": {"kind": "ignored"}}}, "only ignored"),
        ({"columns": {"y": NUMBER}}, "got the target"),
        ({"client": "x"}, "got the client"),
        ({"columns": {"x": 3}}, "column 'x'"),
        ({"columns": {"x": NUMBER | {"kind": "numbr"}}}, "kind ="),
        ({"columns": {"x": NUMBER | {"max": 0}}}, "min < max"),
        ({"columns": {"x": NUMBER | {"max": float("inf")}}}, "finite number that is public"),
        ({"columns": {"x": NUMBER | {"missing": 7}}}, "fill 7.0"),
        ({"columns": {"x": NUMBER | {"mising": 1}}}, "did you mean 'missing'"),
        ({"columns": {"x": {"kind": "category", "values": []}}}, "list of values"),
        ({"columns": {"x": {"kind": "category", "values": ["a"], "other": 1}}}, "other = true or false"),
    ],
)
def test_a_schema_that_cannot_mean_what_it_says_is_refused(changes, what):
    content = {"target": "y", "classes": ["a", "b"], "columns": {"x": NUMBER}}
    parse_schema(content, "schema.toml")
    with pytest.raises(DataError, match=what):
        parse_schema(content | changes, "schema.toml")


def test_a_schema_that_is_not_toml_says_so(tmp_path):
    (tmp_path / "schema.toml").write_text("target =")
    with pytest.raises(DataError, match="to be TOML"):
        read_schema(tmp_path / "schema.toml")
