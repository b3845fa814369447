"""The audit log for people: does it hold together, and what left in a period, as a table, one HTML page, or CSV."""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medfl.client.audit import Event
from medfl.shared.audit_log import rows_as_csv
from medfl.shared.chain import Inspection, Row
from medfl.shared.errors import ConfigError
from medfl.shared.files import write_whole
from medfl.shared.passage import Form

_KINDS = {
    "query.offer": "study offer",
    "query.weight": "weight in the mean",
    "query.phase": "secure sum",
    "query.ledger": "lengths and hashes of logs",
    "train": "training",
    "evaluate": "scores",
}
_COLUMNS = (
    *("row", "time", "time_in_log", "event", "study", "name", "kind", "phase", "round", "bytes", "sha256", "form"),
    *("epsilon", "epsilon_total", "outcome", "code", "reason"),
    *("release", "configuration", "roster", "epoch", "members", "hash"),
)
_STYLE = """
body { font: 10pt/1.35 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #111 }
table { border-collapse: collapse; width: 100%; margin: .5em 0 1.5em }
th, td { border: 1px solid #999; padding: .2em .5em; text-align: left; vertical-align: top }
th { background: #eee } td.n { text-align: right; white-space: nowrap } code { overflow-wrap: anywhere }
thead { display: table-header-group } tr { break-inside: avoid }
.bad { border: 3px solid #b00; padding: .5em; font-weight: bold }
@media print { body { margin: 0; max-width: none; font-size: 8.5pt } @page { size: A4 landscape; margin: 12mm } }
"""


@dataclass(frozen=True, slots=True)
class Report:
    """The rows of a period, days in UTC and both included, and what is known of the whole log."""

    site: str
    inspection: Inspection
    since: datetime.date | None = None
    until: datetime.date | None = None

    @property
    def rows(self) -> list[Row]:
        """Of the period."""
        first = "" if self.since is None else self.since.isoformat()
        last = "9" if self.until is None else self.until.isoformat()
        return [row for row in self.inspection.rows if first <= written(row)[:10] <= last]

    @property
    def period(self) -> str:
        """In words."""
        begin = "the first row" if self.since is None else str(self.since)
        return f"{begin} to {'the last row' if self.until is None else str(self.until)} (days in UTC)"

    @property
    def state(self) -> str:
        """Whether the log verifies, and where it ends."""
        head = self.inspection.head
        if self.inspection.problem is None:
            return f"The log verifies: {head.rows} rows, hash of the last one {head.digest}"
        return f"THE LOG DOES NOT VERIFY: {self.inspection.problem}. Only the {head.rows} rows before that are shown"

    @property
    def jumps(self) -> str:
        """Of this machine's clock, over the whole log, in words; empty where it never ran backwards."""
        pairs = zip(self.inspection.rows, self.inspection.rows[1:], strict=False)
        back = [(one, other) for one, other in pairs if written(other) < written(one)]
        if not back:
            return ""
        one, other = max(back, key=lambda pair: _ran_back(*pair))
        more = f", the furthest of {len(back)} times" if len(back) > 1 else ""
        return (
            f"THE CLOCK OF THIS MACHINE RAN BACK from {written(one)[:19]} (row {one['row']}) to {written(other)[:19]} "
            f"(row {other['row']}){more}. Days here are what it said: what left before a jump may stand under another "
            "day. A report without --from and --to has every row"
        )


def written(row: Row) -> str:
    """When the clock said that ``row`` was written: its time in the log never runs backwards, as a clock may."""
    return str(row.get("clock_said", row["time"]))


def _ran_back(one: Row, other: Row) -> datetime.timedelta:
    try:
        first, then = (datetime.datetime.fromisoformat(written(row)).replace(tzinfo=None) for row in (one, other))
        return first - then  # both in UTC
    except ValueError:  # no row of ours; one that somebody forged must not end the report
        return datetime.timedelta(0)


@dataclass(frozen=True, slots=True)
class StudyTotal:
    """What passed for one study. Sizes in bytes."""

    study: str  # digest; empty: messages of no study that was named
    name: str
    received: int
    received_bytes: int
    sent: int
    sent_bytes: int
    results_masked: int
    results_clear: int
    refused: int  # answers that something failed or was refused
    epsilon: float | None  # of this study, at its last result


def totals(report: Report) -> list[StudyTotal]:
    """By study, in the order of appearance. A study's name is that of its last offer, also before the period."""
    names = {row.get("study", ""): row["name"] for row in report.inspection.rows if row.get("name")}
    rows = [row for row in report.rows if row["event"] in (Event.IN, Event.OUT)]
    studies = dict.fromkeys(row.get("study", "") for row in rows)
    return [_total(study, names.get(study, ""), [r for r in rows if r.get("study", "") == study]) for study in studies]


def write_report(report: Report, out: Path | None) -> list[str]:
    """Write ``out``, ``.html`` or ``.csv``, for this account only; returns the lines to tell, all of them without it.

    Raises:
        ConfigError: ``out`` ends otherwise.
    """
    lines = [f"site {report.site}, {report.period}", report.state, *filter(None, [report.jumps])]
    if out is None:
        return lines + [_total_line(total) for total in totals(report)]
    match out.suffix:
        case ".html":
            content = as_html(report)
        case ".csv":
            content = as_csv(report)
        case _:
            raise ConfigError(f"--out {out}: must end in .html or .csv")
    write_whole(out, content.encode())
    return [*lines, f"written to {out}"]


def as_csv(report: Report) -> str:
    """Every row of the period, for a spreadsheet."""
    rows = ({**row, "time": written(row), "time_in_log": row["time"]} for row in report.rows)
    return rows_as_csv(rows, _COLUMNS)


def as_html(report: Report) -> str:
    """One page without anything from elsewhere: totals by study, each result that left, refusals, the node's starts."""
    rows = report.rows
    sent = [row for row in rows if row["event"] == Event.OUT]
    results = [row for row in sent if row.get("form") != Form.NOTHING]
    failures = [row for row in sent if row.get("outcome") == "failed"]
    names = {total.study: _study_name(total) for total in totals(report)}
    parts = [
        f"<h1>What left site {html.escape(report.site)}</h1>",
        f"<p>{html.escape(report.period)}</p>",
        f'<p class="{"bad" if report.inspection.problem else "good"}">{html.escape(report.state)}</p>',
        *(f'<p class="bad">{html.escape(jumps)}</p>' for jumps in filter(None, [report.jumps])),
        "<h2>By study</h2>",
        _table(
            ("study", "received", "bytes", "sent", "bytes", "results masked", "results in clear", "refused", "epsilon"),
            [_total_cells(total) for total in totals(report)],
        ),
        "<h2>Results that left</h2>",
        _table(
            ("time (UTC)", "study", "round", "what", "bytes", "protected how", "SHA-256"),
            [
                (
                    written(row)[:19],
                    names[row.get("study", "")],
                    row.get("round", ""),
                    _what(row),
                    row.get("bytes", ""),
                    protection(row),
                    str(row.get("sha256", "")),
                )
                for row in results
            ],
        ),
        "<h2>Refusals and failures</h2>",
        _table(
            ("time (UTC)", "study", "round", "what", "answer"),
            [
                (
                    written(row)[:19],
                    names[row.get("study", "")],
                    row.get("round", ""),
                    _what(row),
                    ": ".join(str(row[key]) for key in ("code", "reason") if row.get(key)),
                )
                for row in failures
            ],
        ),
        "<h2>The node</h2>",
        _table(
            ("time (UTC)", "event", "release", "SHA-256 of the site file", "roster"),
            [
                (
                    written(row)[:19],
                    row["event"],
                    row.get("release", ""),
                    row.get("configuration", ""),
                    f"epoch {row['epoch']}, {row.get('roster', '')}" if "epoch" in row else "",
                )
                for row in rows
                if row["event"] not in (Event.IN, Event.OUT)
            ],
        ),
        "<p>A row is on the disk before its message is sent: one may stand for a message that a broken line or a "
        "deadline then stopped, and none leaves without one. All else that was sent (keys, shares, acknowledgements) "
        "is in the totals, and message by message in the CSV.</p>",
    ]
    head = f'<meta charset="utf-8"><title>What left site {html.escape(report.site)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def protection(row: Row) -> str:
    """How the result in a row was protected, in words."""
    words = "masked: only the sum over the sites can be read" if row.get("form") == Form.MASKED else "in clear"
    if "epsilon" not in row:
        return words
    return f"{words}; noised: epsilon {row['epsilon']:.3f} of this study, {row['epsilon_total']:.3f} in total"


def _total(study: str, name: str, rows: Sequence[Row]) -> StudyTotal:
    received = [row for row in rows if row["event"] == Event.IN]
    sent = [row for row in rows if row["event"] == Event.OUT]
    forms = [row.get("form") for row in sent]
    return StudyTotal(
        study,
        name,
        len(received),
        sum(row.get("bytes", 0) for row in received),
        len(sent),
        sum(row.get("bytes", 0) for row in sent),
        forms.count(Form.MASKED),
        forms.count(Form.CLEAR),
        sum(row.get("outcome") == "failed" for row in sent),
        next((row["epsilon"] for row in reversed(sent) if "epsilon" in row), None),
    )


def _total_line(total: StudyTotal) -> str:
    spent = "" if total.epsilon is None else f", epsilon {total.epsilon:.3f}"
    return (
        f"study {_study_name(total)}: received {total.received} messages of {total.received_bytes:,} bytes; sent "
        f"{total.sent} of {total.sent_bytes:,} bytes, among them {total.results_masked} results masked, "
        f"{total.results_clear} in clear, {total.refused} refusals{spent}"
    )


def _study_name(total: StudyTotal) -> str:
    return f"{total.name} {total.study[:16]}".strip() or "none named"


def _total_cells(total: StudyTotal) -> tuple[object, ...]:
    return (
        f"{total.name} {total.study}".strip() or "none named",
        total.received,
        total.received_bytes,
        total.sent,
        total.sent_bytes,
        total.results_masked,
        total.results_clear,
        total.refused,
        "" if total.epsilon is None else f"{total.epsilon:.3f}",
    )


def _what(row: Row) -> str:
    kind = str(row.get("kind", ""))
    phase = str(row.get("phase", "")).replace("_", " ")
    return f"{_KINDS.get(kind, kind)}{f', {phase}' if phase else ''}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["".join(_html_cell(cell) for cell in row) for row in rows]
    if not lines:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _html_cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    text = html.escape(str(value))
    return f"<td><code>{text}</code></td>" if len(text) >= 64 else f"<td>{text}</td>"
