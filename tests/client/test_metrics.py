"""The node's figures follow the audit log row by row."""

from __future__ import annotations

from pathlib import Path

from medfl.client.audit import Audit, Price
from medfl.client.metrics import Gauges
from medfl.client.node import Phase
from medfl.shared.passage import Answer, Content, Form, Passage


def value(gauges: Gauges, name: str, **labels: str) -> float | None:
    return gauges.registry.get_sample_value(name, labels)


def test_what_came_what_left_and_what_is_spent(tmp_path: Path) -> None:
    gauges = Gauges()
    audit = Audit(tmp_path / "audit.jsonl", on_row=gauges.row)
    passage = Passage("train", "ab" * 32, 3)
    audit.received(passage, Content(4000, "0" * 64))
    audit.leaves(passage, Answer("ready"), form=Form.NOTHING, content=Content(50, "0" * 64))
    masked = Passage("query.phase", "ab" * 32, 3, phase="masked_input")
    audit.leaves(masked, Answer("phase"), form=Form.MASKED, content=Content(4100, "0" * 64), price=Price(1.5, 2.25))
    audit.leaves(passage, Answer("failed", "refused", "outside hours"), form=Form.NOTHING)
    audit.close()
    assert value(gauges, "medfl_audit_rows") == 4
    assert value(gauges, "medfl_round") == 3
    assert value(gauges, "medfl_received_bytes_total", kind="train") == 4000
    assert value(gauges, "medfl_left_bytes_total", kind="query.phase", form="masked") == 4100
    assert value(gauges, "medfl_left_bytes_total", kind="train", form="no result") == 50
    assert value(gauges, "medfl_answers_total", kind="train", outcome="failed") == 1
    assert value(gauges, "medfl_epsilon_total") == 2.25


def test_connected_and_at_work() -> None:
    gauges = Gauges()
    for phase, figures in ((Phase.WAITING, (0, 0)), (Phase.ONLINE, (1, 0)), (Phase.WORKING, (1, 1))):
        gauges.phase(phase)
        assert (value(gauges, "medfl_online"), value(gauges, "medfl_working")) == figures
