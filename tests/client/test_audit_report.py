"""The log as a person reads it: totals that can be added up, one page that holds no script, a CSV, and the command."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from consortium import found_consortium_folder
from waiting import wait_for

from medfl.client.audit import Audit, Price
from medfl.client.audit_report import Report, as_csv, as_html, totals, write_report
from medfl.client.cli import main
from medfl.client.config import load_site
from medfl.client.trust import site_rosters
from medfl.shared import chain as chains
from medfl.shared.audit_log import inspected, verified
from medfl.shared.errors import ConfigError, PolicyRefusal
from medfl.shared.passage import Answer, Content, Form, Passage

LUNGS, HEARTS = "1" * 64, "2" * 64


class Calendar:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.day = 1

    def __call__(self) -> datetime.datetime:
        return datetime.datetime(2027, 1, self.day, 12, tzinfo=datetime.UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Days 1 to 4 of January 2027: a start and an offer, a masked and noised round, a clear one, a refusal."""
    path, clock = tmp_path / "state" / "audit.jsonl", Calendar()
    audit = Audit(path, clock=clock)
    audit.started(release="1.0", configuration="f" * 64, roster="e" * 64, epoch=4)
    audit.received(Passage("query.offer", LUNGS, name="lungs"), Content(500, "a" * 64))
    audit.leaves(Passage("query.offer", LUNGS), Answer("accepted"), form=Form.NOTHING, content=Content(100, "b" * 64))
    clock.day = 2
    masked = Passage("query.phase", LUNGS, 1, phase="masked_input")
    audit.received(masked, Content(2000, "c" * 64))
    audit.leaves(masked, Answer("phase"), form=Form.MASKED, content=Content(40_000, "d" * 64), price=Price(1.25, 2.5))
    clock.day = 3
    audit.leaves(Passage("train", HEARTS, 9), Answer("trained"), form=Form.CLEAR, content=Content(7_000, "9" * 64))
    clock.day = 4
    failed = Answer("failed", "refused", "outside hours")
    audit.leaves(Passage("train", LUNGS, 2), failed, form=Form.NOTHING)
    audit.close()
    return path


def report(path: Path, first: int | None = None, last: int | None = None) -> Report:
    days = [None if day is None else datetime.date(2027, 1, day) for day in (first, last)]
    return Report("north", inspected(path), *days)


def test_totals_by_study_add_up(path: Path) -> None:
    lungs, hearts = totals(report(path))
    assert (lungs.study, lungs.name, lungs.received, lungs.received_bytes) == (LUNGS, "lungs", 2, 2500)
    assert (lungs.sent, lungs.sent_bytes, lungs.refused) == (3, 40_100, 1)
    assert (lungs.results_masked, lungs.results_clear, lungs.epsilon) == (1, 0, 1.25)
    assert (hearts.study, hearts.name, hearts.sent_bytes, hearts.results_clear, hearts.epsilon) == (
        *(HEARTS, "", 7000),
        *(1, None),
    )


def test_a_period_holds_both_its_days_and_knows_names_from_before_it(path: Path) -> None:
    assert [row["time"][8:10] for row in report(path, 2, 3).rows] == ["02", "02", "03"]
    assert totals(report(path, 2, 3))[0].name == "lungs"
    assert len(report(path, None, 1).rows) == 3
    assert len(report(path, 4).rows) == 1
    assert report(path, 5).rows == []
    assert "verifies: 7 rows" in report(path, 5).state  # of the whole log


@pytest.fixture
def jumped(tmp_path: Path) -> Path:
    """One result in October 2026, one while the clock said 2036, then three in November."""
    path, said = tmp_path / "jumped" / "audit.jsonl", []
    audit = Audit(path, clock=lambda: said[-1])
    for moment in ((2026, 10, 1), (2036, 1, 1), *((2026, 11, day) for day in (3, 4, 5))):
        said.append(datetime.datetime(*moment, 12, tzinfo=datetime.UTC))
        audit.leaves(Passage("train", LUNGS, 1), Answer("trained"), form=Form.CLEAR, content=Content(1000, "9" * 64))
    audit.close()
    return path


def november(path: Path) -> Report:
    return Report("north", inspected(path), datetime.date(2026, 11, 1), datetime.date(2026, 11, 30))


def test_after_a_jump_of_the_clock_rows_count_on_the_day_that_the_clock_then_said(jumped: Path) -> None:
    assert [row["row"] for row in november(jumped).rows] == [3, 4, 5]
    assert totals(november(jumped))[0].sent_bytes == 3000
    times = [row[0] for row in Cells(as_html(november(jumped))).rows if row[-1] == "9" * 64]
    assert times == [f"2026-11-0{day}T12:00:00" for day in (3, 4, 5)]
    first = next(csv.DictReader(io.StringIO(as_csv(november(jumped)))))
    assert (first["time"][:10], first["time_in_log"][:10]) == ("2026-11-03", "2036-01-01")


def test_a_report_says_that_the_clock_jumped_and_how_to_see_every_row(path: Path, jumped: Path) -> None:
    told = write_report(november(jumped), None)
    words = "RAN BACK from 2036-01-01T12:00:00 (row 2) to 2026-11-03T12:00:00 (row 3). Days"
    assert words in told[2]
    assert "without --from and --to has every row" in told[2]
    assert words in as_html(november(jumped))
    assert len(Report("north", inspected(jumped)).rows) == 5
    forged = {**inspected(jumped).rows[-1], "clock_said": "+never"}
    more = Report("north", chains.Inspection([*inspected(jumped).rows, forged], None))
    assert "(row 3), the furthest of 2 times" in more.jumps
    assert "'+never" in as_csv(more)
    assert report(path).jumps == ""
    assert "RAN BACK" not in as_html(report(path))


class Cells(HTMLParser):
    """The rows of all tables of a page; notes every element and attribute."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")


def test_the_page_says_what_left_when_how_large_under_which_study_and_protected_how(path: Path) -> None:
    page = as_html(report(path))
    rows = Cells(page).rows
    study = f"lungs {LUNGS[:16]}"
    noised = "masked: only the sum over the sites can be read; noised: epsilon 1.250 of this study, 2.500 in total"
    assert [
        *("2027-01-02T12:00:00", study, "1", "secure sum, masked input", "40,000", noised, "d" * 64),
    ] in rows
    assert ["2027-01-03T12:00:00", HEARTS[:16], "9", "training", "7,000", "in clear", "9" * 64] in rows
    assert ["2027-01-04T12:00:00", study, "2", "training", "refused: outside hours"] in rows
    assert ["2027-01-01T12:00:00", "started", "1.0", "f" * 64, f"epoch 4, {'e' * 64}"] in rows
    assert [f"lungs {LUNGS}", "2", "2,500", "3", "40,100", "1", "0", "1", "1.250"] in rows
    assert "The log verifies: 7 rows, hash of the last one" in page
    assert inspected(path).head.digest in page


def test_the_page_loads_nothing_and_runs_nothing(path: Path) -> None:
    page = as_html(report(path))
    cells = Cells(page)
    assert not cells.tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert cells.attributes <= {"lang", "charset", "class"}
    assert "url(" not in page
    assert "@import" not in page


def forge(path: Path, **fields: object) -> None:
    """Add a row as somebody would who can write to the disk."""
    chain = chains.Chain(path, chains.Role("forged", ""))
    chain.append({"event": "out", "form": "clear", **fields})
    chain.close()


def test_what_somebody_forged_into_the_log_is_escaped(path: Path) -> None:
    forge(path, study="<script>alert(1)</script>", reason="=HYPERLINK(1)", kind='"><img src=x>')
    page = as_html(report(path))
    assert not Cells(page).tags & {"script", "img"}
    assert "&lt;script&gt;" in page
    last = list(csv.DictReader(io.StringIO(as_csv(report(path)))))[-1]
    assert last["reason"] == "'=HYPERLINK(1)"


def test_the_csv_has_every_row_of_the_period(path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(report(path)))))
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 8)]
    assert (rows[4]["bytes"], rows[4]["form"], rows[4]["epsilon"]) == ("40000", "masked", "1.25")
    assert (rows[6]["code"], rows[6]["reason"], rows[6]["bytes"]) == ("refused", "outside hours", "")
    assert len(list(csv.DictReader(io.StringIO(as_csv(report(path, 3, 4)))))) == 2


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"bytes":40000', b'"bytes":39999'))


def test_a_changed_row_is_found_and_the_report_stops_before_it(path: Path) -> None:
    edit(path)
    with pytest.raises(PolicyRefusal, match=r"row 5 is not as it was written\. The 4 rows before") as refusal:
        verified(path)
    assert refusal.value.reason == "audit log damaged"
    page = as_html(report(path))
    assert "THE LOG DOES NOT VERIFY: row 5 is not as it was written" in page
    assert "39,999" not in page


def test_a_log_written_anew_is_found_by_a_hash_that_was_noted(path: Path) -> None:
    noted = [row["hash"] for row in inspected(path).rows]
    assert "row 3 of 2027-01-01" in verified(path, head=noted[2])[-1]
    for file in (path, path.with_name("audit.jsonl.head")):
        file.unlink()
    forge(path)
    assert verified(path)[0].startswith("1 rows ")  # a history of its own
    with pytest.raises(PolicyRefusal, match="cut or written anew"):
        verified(path, head=noted[2])


def test_a_log_that_was_removed_or_never_begun_is_told(path: Path) -> None:
    path.unlink()
    with pytest.raises(PolicyRefusal, match="it has 0 whole rows, and row 7 was written last"):
        verified(path)
    path.with_name("audit.jsonl.head").unlink()
    with pytest.raises(ConfigError, match="begins it at its first start"):
        verified(path)


@pytest.fixture
def home(path: Path) -> Path:
    """A site whose state folder has the log."""
    home = path.parent.parent
    (home / "site.yaml").write_text(
        "site: north\ncoordinator: 127.0.0.1:1\nkeys: north/keys\nstate: state\n"
        "data: {source: table, file: sites.csv}\ndevice: cpu\n"
    )
    return home


def audit(home: Path, *options: str) -> int:
    return main(["--site", str(home / "site.yaml"), "audit", *options])


def test_verify_tells_the_rows_and_the_last_hash(home: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(home, "verify") == 0
    out = capsys.readouterr().out
    assert out.startswith("7 rows are as they were written\n  first of 2027-01-01")
    assert max(map(len, out.splitlines())) <= 80
    assert inspected(path).head.digest in out
    assert audit(home, "verify", "--head", "0" * 64) == 3
    edit(path)
    assert audit(home, "verify") == 3
    assert "row 5 is not as it was written" in capsys.readouterr().err


def test_report_prints_totals_or_writes_a_file_for_the_owner_only(
    home: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(home, "report", "--from", "2027-01-02", "--to", "2027-01-04") == 0
    out = capsys.readouterr().out
    assert "2027-01-02 to 2027-01-04" in out
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    assert f"study lungs {LUNGS[:16]}: received 1 messages of 2,000 bytes; sent 2 of 40,000 bytes" in words
    for name in ("left.html", "left.csv"):
        assert audit(home, "report", "--out", str(home / name)) == 0
        assert (home / name).stat().st_mode & 0o777 == 0o600
    assert (home / "left.html").read_text() == as_html(report(path))
    assert (home / "left.csv").read_bytes() == as_csv(report(path)).encode()
    assert audit(home, "report", "--out", str(home / "left.pdf")) == 2
    edit(path)
    assert audit(home, "report") == 3
    assert "DOES NOT VERIFY" in capsys.readouterr().out


def test_a_day_that_is_none_ends_with_status_two(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        audit(home, "report", "--from", "2027-02-30")
    assert end.value.code == 2


def test_the_command_works_without_torch_or_flower(home: Path) -> None:
    code = (
        "import sys; from medfl.client.cli import main; "
        f"status = main(['--site', {str(home / 'site.yaml')!r}, 'audit', 'verify']); "
        "assert not {'torch', 'flwr'} & set(sys.modules), 'slow'; sys.exit(status)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=240, check=False).returncode == 0


def test_a_running_node_has_its_log_read_and_writes_its_start_and_its_end(home: Path, path: Path) -> None:
    found_consortium_folder(home)
    node = subprocess.Popen(
        [sys.executable, "-m", "medfl.client.cli", "--site", str(home / "site.yaml")], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for((path.parent / "lock").exists)  # it listens to signals by now
        assert len(inspected(path).rows) == 8
        assert audit(home, "verify") == 0
        started = inspected(path).rows[7]
        assert started["configuration"] == hashlib.sha256((home / "site.yaml").read_bytes()).hexdigest()
    finally:
        os.kill(node.pid, signal.SIGTERM)
        _, told = node.communicate(timeout=240)
    last = inspected(path).rows[8]
    assert (node.returncode, last["event"]) == (0, "stopped")
    assert last["hash"] in told  # an anchor in the journal, outside the file
    assert started["hash"] in told


def test_a_confirmed_roster_is_in_the_log(
    home: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found_consortium_folder(home)
    shutil.copytree(home / "north" / "state" / "roster", home / "state" / "roster")
    roster = site_rosters(load_site(home / "site.yaml")).newest()
    assert roster is not None
    (home / "state" / "roster" / "roster.json").unlink()
    rows = len(inspected(path).rows)
    confirm = ["--site", str(home / "site.yaml"), "roster", "confirm"]
    answers = iter(["no", "yes"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert main(confirm) == 3
    assert len(inspected(path).rows) == rows
    assert main(confirm) == 0
    row = inspected(path).rows[rows]
    assert (row["event"], row["epoch"], row["members"]) == ("roster confirmed", 2, 3)
    assert row["roster"] == roster.roster.digest.hex()
