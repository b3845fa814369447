"""``studies``, ``approve`` and ``withdraw`` at a site whose node does not run, as its administrator types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from signer import offer_of
from tiny import masks_study

from medfl.client.approvals import Approvals, signed_offer
from medfl.client.cli import main
from medfl.client.policy import Policy
from medfl.shared.admin import AdminSocket
from medfl.shared.chain import inspect
from medfl.shared.study import Study

STUDY = masks_study(name="spots", purpose="Outline bright spots")
POLICY = "{allow_no_privacy: true, require_secure_aggregation: false}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A site to which one study was offered."""
    write_site(tmp_path, POLICY)
    offered(tmp_path, STUDY)
    return tmp_path


def write_site(home: Path, policy: str) -> None:
    (home / "site.yaml").write_text(
        f"site: north\ncoordinator: 127.0.0.1:1\nkeys: keys\nstate: state\npolicy: {policy}\n"
        "data: {source: table, file: pictures/sites.csv}\n"
    )


def offered(home: Path, study: Study) -> None:
    offer = offer_of(study)
    Approvals(Policy(), home / "state").offer(study, signed_offer(offer.canonical, offer.signature))


def told(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["--site", str(home / "site.yaml"), *arguments])
    out, err = capsys.readouterr()
    assert all(len(line) <= 100 for line in out.splitlines())
    return status, out, err


def test_what_is_offered_is_listed_shown_approved_and_withdrawn(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = STUDY.digest[:12]
    status, out, _ = told(home, capsys, "studies")
    assert status == 0
    assert f"spots                     {short}" in out
    assert "0/2  waits for approval" in out
    status, out, _ = told(home, capsys, "studies", "spots")
    assert status == 0
    assert STUDY.digest in out
    assert f'approve {short} --by "NAME"' in out

    status, out, _ = told(home, capsys, "approve", short, "--by", "Dr A", "--ethics", "2027-12")
    assert (status, out) == (0, "study spots is approved: it may run here once the node is started\n")
    assert "approved by Dr A on" in told(home, capsys, "studies", "spots")[1]
    found = json.loads(told(home, capsys, "studies", "--json")[1])["studies"][0]
    assert (found["state"], found["runs"], found["decision"]["ethics"]) == ("approved", True, "2027-12")

    status, out, _ = told(home, capsys, "withdraw", "spots", "--by", "Dr B")
    assert status == 0
    assert "study spots is withdrawn" in out
    assert "has trained no round" in out
    assert "withdrawn" in told(home, capsys, "studies")[1]
    rows = inspect(home / "state" / "audit.jsonl").rows
    assert [(row["event"], row["by"]) for row in rows] == [("study approved", "Dr A"), ("study withdrawn", "Dr B")]


def test_an_approval_that_the_policy_does_not_follow_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_site(home, "{}")
    status, out, _ = told(home, capsys, "approve", "spots", "--by", "Dr A")
    assert status == 3
    assert "this site's policy still forbids it" in " ".join(out.split())


def test_a_study_that_nobody_offered_is_approved_by_its_whole_digest_only(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = masks_study(name="other")
    status, _, err = told(home, capsys, "approve", other.digest[:12], "--by", "Dr A")
    assert status == 2
    assert "no study here is called" in err
    assert told(home, capsys, "approve", other.digest, "--by", "Dr A")[0] == 0
    offered(home, other)
    assert "approved" in told(home, capsys, "studies", "other")[1]


def test_who_decides_has_to_be_said_in_printable_words(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        told(home, capsys, "approve", "spots")
    assert caught.value.code == 2
    for name in ("", "Dr\x1b[2J"):
        status, _, err = told(home, capsys, "approve", "spots", "--by", name)
        assert status == 2
        assert "--by: " in err


def test_while_the_node_holds_the_state_but_does_not_answer_nothing_is_decided(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with AdminSocket(home / "state"):  # a node of another release, which knows no such question
        status, _, err = told(home, capsys, "approve", "spots", "--by", "Dr A")
    assert status == 1
    assert "does not know 'approve': restart it" in err
    assert "waits for approval" in told(home, capsys, "studies")[1]


def test_where_nothing_was_offered_it_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "state" / "studies" / STUDY.digest / "offer.signed").unlink()
    assert "no study has been offered" in told(home, capsys, "studies")[1]
