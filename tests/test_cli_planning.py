"""tacit plan and tacit tune on the command line: what they print, what they refuse, and how they end."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tacit
from simulations.scenario import FOLDERS, KEYS, MACHINE

ROOT = Path(__file__).parents[1]
# Without sampling every accountant answers at once.
QUICK = ("--clients", "2", "--rounds", "1", "--steps-per-round", "1", "--sample-rate", "1", "--mode", "hooks")
Says = Callable[..., tuple[int, str, str]]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Says:
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = tacit.main(arguments)
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def test_the_pages_of_plan_and_tune_open_without_the_heavy_libraries(says: Says) -> None:
    program = (
        "import sys, tacit\n"
        "codes = [tacit.main([verb, '--help']) for verb in ('plan', 'tune')]\n"
        "print([name for name in ('torch', 'flwr', 'opacus', 'numpy', 'rich') if name in sys.modules], codes)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] [0, 0]"
    for key in KEYS:
        assert (f"--{key.name} " in says("plan", "--help")[1]) == (key.group not in (MACHINE, FOLDERS)) or (
            key.name == "ledgers"
        )
        assert f"--{key.name} " in says("tune", "--help")[1]


def test_plan_prints_every_figure_and_draws_both_sweeps(says: Says, tmp_path: Path) -> None:
    plot = tmp_path / "plan.svg"
    code, out, err = says("plan", *QUICK, "--plot", str(plot))
    assert (code, err) == (0, "")
    for words in (
        "noise ",
        "expected batch 718",
        "1 spare charge",
        "3.00 at delta 1e-05, by the RDP filter",
        "by PLD",
        "by PRV",
        "to replace one record",
        "at delta 1e-07",
        "up to 5 records",
        "rho ",
        "finds ",
        "650 parameters",
        "noise norm = sigma * C * sqrt(P)",
        "other numbers of rounds",
        "other budgets",
        "██",
    ):
        assert words in out, words
    assert plot.read_text().startswith("<svg")


def test_plan_as_json_is_the_same_plan_and_unknown_is_a_word(says: Says) -> None:
    code, out, _ = says("plan", *QUICK, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["schema"] == "tacit-plan/1"
    assert facts["cost"]["filter"]["epsilon"] <= 3.0
    _, out, _ = says("plan", *QUICK, "--task", "image-folder", "--records-per-client", "100")
    assert "its norm is unknown" in out
    _, out, _ = says("plan", *QUICK, "--epsilon", "300")
    assert "unknown by PLD" in out
    # Nothing that the accountants did not compute looks like a figure.
    assert "nan" not in out


def test_a_scenario_file_is_planned_and_its_ledgers_are_read(says: Says, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(f'clients = 2\nrounds = 1\nepsilon = 2.0\ndelta = 1e-5\nledgers = "{tmp_path / "ledgers"}"\n')
    assert "what is left" not in says("plan", str(file), "--sample-rate", "1")[1]
    assert not (tmp_path / "ledgers").exists()
    code, _, err = says("tune", *QUICK, "--epsilon", "2", "--try", "lr=1", "--out", str(tmp_path / "s"))
    assert (code, err) == (0, "")
    code, out, _ = says("plan", str(file), "--sample-rate", "1", "--ledgers", str(tmp_path / "s"))
    assert code == 0
    assert "client-00001" in out
    assert "Every ledger affords 0 more such jobs" in out
    code, out, _ = says("plan", *QUICK, "--epsilon", "0.5", "--ledgers", str(tmp_path / "s"), "--json")
    # One of two charges was spent: what is left pays for no second job of epsilon 2, but for some of epsilon 0.5.
    assert all(0 < row["runs"] < row["runs_without_retries"] < row["rounds"] + 1 for row in json.loads(out)["ledgers"])
    assert all(row["spent"] > 0 and row["charges"] == 1 for row in json.loads(out)["ledgers"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("plan", "--delta", "0"), 2, "delta > 0"),
        (("plan", "--delta", "1"), 2, "0 < delta < 1"),
        (("plan", "--rounds", "0"), 2, "rounds >= 1"),
        (("plan", "--epsilon", "0", "--noise-multiplier", "0"), 2, "no training without noise"),
        (("plan", "--noise-multiplier", "0.001"), 2, "noise that protects at all"),
        (("plan", "--nois-multiplier", "1"), 2, "did you mean '--noise-multiplier'"),
        (("plan", "--task", "digts"), 2, "did you mean 'digits'"),
        (("plan", "--ledgers", "nowhere"), 4, "ledger.jsonl"),
        (("plan", "nowhere.toml"), 2, "check the path"),
        (("plann",), 2, "did you mean 'plan'"),
        (("tune",), 2, "at least one key to try"),
        (("tune", "--try", "lrr=1"), 2, "did you mean 'lr'"),
        (("tune", "--metrc", "loss"), 2, "did you mean '--metric'"),
        (("tune", "--try", "lr=1", "--list", "x"), 2, "got both"),
        (("tune", "--resume", "x", "--try", "lr=1"), 2, "--resume alone"),
        (("tune", "--resume", "nowhere"), 6, "search.json"),
        (("tune", "--try", "lr=1", "--candidates", "5"), 2, "size of the grid"),
        (("tune", "--try", "lr=1", "--candidates", "x"), 2, "invalid int"),
        (("tune", "--try", "lr=1", "--validation", "2"), 2, "0 <= validation < 1"),
        (("tune", "--try", "lr=1,2", "--epsilon", "0.008"), 2, "some noise"),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(
    says: Says, arguments: tuple[str, ...], code: int, words: str
) -> None:
    got, out, err = says(*arguments)
    assert (got, out) == (code, "")
    assert err.count("\n") == 1
    assert words in err


def test_tune_prints_its_price_first_and_the_whole_search_last(says: Says, tmp_path: Path) -> None:
    out_folder = str(tmp_path / "search")
    code, out, err = says("tune", *QUICK, "--try", "lr=0.5,1", "--out", out_folder)
    assert (code, err) == (0, "")
    assert out.index("for all 2 candidates") < out.index("candidate 1/2") < out.index("The whole search cost epsilon")
    assert "winner" in out
    search = json.loads((tmp_path / "search/search.json").read_text())
    assert f"The whole search cost epsilon {math.ceil(100 * search['total']['epsilon']) / 100:.2f}" in out
    code, out, _ = says("tune", "--resume", out_folder, "--json")
    assert code == 0
    assert json.loads(out)["winner"] == search["winner"]
    # Another search on the same ledgers is refused before it starts.
    shared = ("--ledgers", f"{out_folder}/ledgers")
    code, _, err = says("tune", *QUICK, *shared, "--try", "lr=0.5,1", "--out", str(tmp_path / "more"))
    assert code == 5
    assert "all 2 candidates" in err
    assert not (tmp_path / "more").exists()


def test_tune_on_public_data_says_that_it_is_free_and_a_dry_run_leaves_nothing(says: Says, tmp_path: Path) -> None:
    code, out, _ = says("tune", *QUICK, "--try", "lr=0.5,1", "--public", "--out", str(tmp_path / "free"))
    assert code == 0
    assert "none: the public data set digits" in out
    assert "It cost no privacy" in out
    assert "nothing" in out
    code, out, _ = says("tune", *QUICK, "--try", "lr=0.5,1", "--dry-run", "--out", str(tmp_path / "dry"))
    assert code == 0
    assert "for all 2 candidates" in out
    assert not (tmp_path / "dry").exists()
