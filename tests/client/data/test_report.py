"""The report of a loading is a table that fits into a terminal of 80 columns, however long the names are."""

from __future__ import annotations

from medfl.client.data.report import DataReport, Range
from medfl.client.data.splits import Split


def test_the_report_is_a_table_of_at_most_80_columns_with_the_commonest_reason_first() -> None:
    report = DataReport(
        patients=12, studies=14, series=15, labels=15, cases=dict.fromkeys(Split, 4), examples=dict.fromkeys(Split, 96),
        quarantined={"gantry tilt": 1, "PET that cannot become SUV: dose, half-life, weight or times are missing": 30},
        unmatched={"a name of a segment that somebody made very long, with every structure and side in it": 2},
        review={}, class_balance={"background": 0.995, "lesion": 0.005},
        spacing_mm=(Range(1, 5), Range(0.5, 0.9), Range(0.5, 0.9)), intensity=Range(-1024, 3071),
        subgroups={"sex": {"M": 5, "F": 7}}, seconds=1.25, held="75 MB of images on cpu",
    )  # fmt: skip
    lines = report.lines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[6] == "left out            30  PET that cannot become SUV: dose, half-life, weight or"
    assert lines[7].strip() == "times are missing"
    assert lines[8] == "                     1  gantry tilt"
    assert "to look at      nothing" in lines
    assert "spacing in mm   1.00..5.00 x 0.50..0.90 x 0.50..0.90" in lines
    assert lines[-3:] == ["                     5  M", "held            75 MB of images on cpu", "seconds         1.2"]
