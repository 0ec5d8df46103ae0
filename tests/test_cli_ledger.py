"""The verbs of auditors and data holders: verify, client, and report over ledgers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import tacit
from privacy.ledger import Book, Receipt, Word
from privacy.transcript import read_ledger
from tests.oracles import ACCOUNT, make_plan, make_request, open_book

KEY = "ab" * 32


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = tacit.main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with open_book(tmp_path / "book") as book:
        for number in (1, 2):
            assert isinstance(book.charge([make_request(number, make_plan(joins=5))])[0], Receipt)
    return tmp_path / "book"


# -- verify -----------------------------------------------------------------------------


def test_verify_prints_one_line_a_check_and_ends_with_0_only_if_nothing_failed(folder: Path, says) -> None:
    code, out, _ = says("verify", folder)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("holds")
    assert "chains and signatures are sound" in lines[0]
    assert any(line.startswith("cannot be proven") and "this code" in line for line in lines)
    assert lines[-1] == "Nothing failed."
    data = (folder / "ledger.jsonl").read_bytes()
    (folder / "ledger.jsonl").write_bytes(data.replace(b'"round":2', b'"round":3'))
    code, out, _ = says("verify", folder)
    assert code == 4
    assert out.splitlines()[0].startswith("does not hold")
    assert "do not hold" in out.splitlines()[-1]


def test_verify_speaks_json(folder: Path, says) -> None:
    code, out, _ = says("verify", folder, "--json")
    told = json.loads(out)
    assert (code, told["holds"]) == (0, True)
    assert {row["result"] for row in told["checks"]} == {"holds", "cannot be proven"}
    assert says("verify", folder / "absent", "--json")[0] == 4


@pytest.mark.parametrize("key", ["", "zz", KEY.upper(), KEY[:-1], KEY + " "])
def test_a_key_with_a_typing_error_is_refused(folder: Path, says, key: str) -> None:
    code, _, err = says("verify", folder, "--key", key)
    assert code == 2
    assert "64 lower-case hex digits" in err


def test_keys_are_read_from_a_file(folder: Path, tmp_path: Path, says) -> None:
    (tmp_path / "keys").write_text(f"# ours\n\n{KEY}  the clinic\n")
    assert says("verify", folder, "--keys", tmp_path / "keys")[0] == 0
    (tmp_path / "keys").write_text("the clinic\n")
    assert says("verify", folder, "--keys", tmp_path / "keys")[0] == 2


# -- client -----------------------------------------------------------------------------


def test_client_ledger_shows_every_charge_and_every_account(folder: Path, says) -> None:
    code, out, _ = says("client", "ledger", folder)
    account = read_ledger(folder).accounts[ACCOUNT]
    assert code == 0
    for word in (ACCOUNT, "update", account.public_key[:16], "Chains and signatures hold.", "1e-05"):
        assert word in out
    told = json.loads(says("client", "ledger", folder, "--json")[1])
    assert [(row["round"], row["spent"] + row["remaining"]) for row in told["charges"]] == [
        (1, pytest.approx(3.0)),
        (2, pytest.approx(3.0)),
    ]
    assert told["accounts"][0]["spent"] == account.spent


def test_client_ledger_changes_nothing_and_makes_nothing(folder: Path, tmp_path: Path, says) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    says("client", "ledger", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for verb in ("ledger", "budget"):
        code, _, err = says("client", verb, tmp_path / "absent")
        assert code == 4
        assert "expected a ledger at" in err
    assert says("client", "export", tmp_path / "absent", tmp_path / "copy")[0] == 4
    assert not (tmp_path / "absent").exists()


def test_g2_a_holder_sets_a_budget_before_any_job_and_no_job_changes_it(tmp_path: Path, says) -> None:
    first = ("client", "budget", tmp_path, "--name", ACCOUNT, "--epsilon", 2, "--population", "one clinic")
    code, _, err = says(*first)
    assert (code, "--delta and --records-bound" in err) == (2, True)
    code, out, _ = says(*first, "--delta", 1e-5, "--records-bound", 5000)
    assert (code, ACCOUNT in out) == (0, True)
    with open_book(tmp_path) as book:
        # What a job grants is not even looked at.
        assert book.accounts[ACCOUNT].grant.epsilon == 2
        dear = make_plan(noise_multiplier=0.8, steps=50)
        assert book.charge([make_request(1, dear)]) == [Word.DECLINED]


def test_g2_lowering_is_free_raising_needs_a_word_and_the_rest_is_fixed(folder: Path, says) -> None:
    budget = ("client", "budget", folder, "--name", ACCOUNT, "--epsilon")
    assert says(*budget, 2.5)[0] == 0
    code, _, err = says(*budget, 3)
    assert (code, "--raise" in err) == (2, True)
    assert says(*budget, 3, "--raise")[0] == 0
    assert "(raised)" in says("client", "budget", folder)[1]
    for flag, value in (("--delta", 1e-6), ("--records-bound", 9), ("--order", 3.0)):
        code, _, err = says(*budget, 2.5, flag, value)
        assert (code, "fixed with the first budget" in err) == (2, True)
    assert says(*budget, 1.5)[0] == 4
    with Book(folder) as book:
        assert book.accounts[ACCOUNT].grant.epsilon == 3
        assert len(book.accounts[ACCOUNT].changes) == 2


def test_export_verify_and_import_go_together(folder: Path, tmp_path: Path, says) -> None:
    copy = tmp_path / "copy.tacit"
    assert json.loads(says("client", "export", folder, copy, "--json")[1])["charges"] == 2
    assert says("verify", copy)[0] == 0
    home = tmp_path / "restored"
    home.mkdir()
    assert says("client", "import", copy, home)[0] == 4
    shutil.copy(folder / "ledger.key", home / "ledger.key")
    assert json.loads(says("client", "import", copy, home, "--json")[1])["added"] == 4
    assert "nothing was changed" in says("client", "import", copy, home)[1]
    assert (home / "ledger.jsonl").read_bytes() == (folder / "ledger.jsonl").read_bytes()


def test_a_verb_of_client_is_asked_for(says) -> None:
    code, _, err = says("client")
    assert code == 2
    assert "VERB" in err or "act" in err


# -- report over ledgers ------------------------------------------------------------------


def test_a_report_over_a_ledger_tells_runs_rounds_and_both_accountants(folder: Path, tmp_path: Path, says) -> None:
    code, out, _ = says("report", folder, "--out", tmp_path, "--json")
    row = json.loads(out)["data_sets"][0]
    account = read_ledger(folder).accounts[ACCOUNT]
    assert (code, row["spent_epsilon"], row["granted_epsilon"]) == (0, account.spent, 3.0)
    assert [line[2] for line in row["history"]] == [1, 2]
    assert (row["runs"][0]["charges"], row["runs"][0]["alone_epsilon"]) == (2, account.spent)
    # One committed schedule, alone: the price of all of it, by loss distributions too.
    schedule = row["schedule"]
    assert (schedule["joins"], schedule["charged"], schedule["event"]["steps"]) == (5, 2, 10)
    assert schedule["pld"] <= schedule["prv"] <= schedule["pld"] + 0.05
    assert schedule["pld"] <= schedule["rdp"]
    assert says("verify", tmp_path / "report.json", tmp_path / "report.html", folder)[0] == 0
    text = (tmp_path / "report.json").read_text()
    (tmp_path / "report.json").write_text(text.replace('"charged": 2', '"charged": 1'))
    assert says("verify", tmp_path / "report.json", folder)[0] == 4


def test_g3_two_jobs_in_one_ledger_get_the_filters_figure_alone(folder: Path, tmp_path: Path, says) -> None:
    with Book(folder) as book:
        book.charge([make_request(1, make_plan(noise_multiplier=9.0), job="cd" * 16)])
    row = json.loads(says("report", folder, "--out", tmp_path, "--json")[1])["data_sets"][0]
    assert (row["schedule"], len(row["runs"])) == (None, 2)


def test_g11_a_ledger_with_test_noise_is_reported_as_infinity(folder: Path, tmp_path: Path, says) -> None:
    with Book(folder) as book:
        book.charge([make_request(3, make_plan(joins=5), noise="test:Seeded")])
    row = json.loads(says("report", folder, "--out", tmp_path, "--json")[1])["data_sets"][0]
    assert (row["spent_epsilon"], row["odds_factor"], row["schedule"]) == ("infinity", "infinity", None)
    assert row["tier"].startswith("none")
    assert {line[-1] for line in row["history"]} == {"infinity"}


def test_one_data_set_in_two_ledgers_is_refused(folder: Path, tmp_path: Path, says) -> None:
    shutil.copytree(folder, tmp_path / "again")
    code, _, err = says("report", folder, tmp_path / "again", "--out", tmp_path)
    assert (code, "each data set once" in err) == (4, True)


def test_without_a_folder_the_ledger_is_that_of_the_joined_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clients import home as homes

    monkeypatch.setattr(homes, "default_home", lambda: tmp_path / "client")
    for verb in ("ledger", "budget"):
        assert tacit.main(["client", verb]) == 10
        assert "tacit client join TOKEN" in capsys.readouterr().err
    folder = tmp_path / "apart"
    command = ["client", "budget", str(folder), "--name", "mine", "--epsilon", "2", "--delta", "1e-5"]
    assert tacit.main([*command, "--records-bound", "1000"]) == 0
    joined = SimpleNamespace(ledger=str(folder))
    monkeypatch.setattr(homes.ClientHome, "settings", property(lambda self: joined))
    for verb in ("ledger", "budget"):
        capsys.readouterr()
        assert tacit.main(["client", verb, "--json"]) == 0
        assert "mine" in capsys.readouterr().out
