"""A journal put back from a backup has forgotten rounds that were answered: it is noticed, and answers no sum."""

import shutil
from pathlib import Path

import pytest
from secagg_world import STUDY, Consortium, Stage
from sites import make_site, offer, policy_for
from tiny import classes_study

from medfl.client.audit import Audit
from medfl.client.participant import Participant
from medfl.shared.chain import Head
from medfl.shared.errors import PolicyRefusal
from medfl.shared.messages import HeadsRequest, Log
from medfl.shared.passage import Answer, Form, Passage
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.messages import SurvivorList
from medfl.shared.secagg.reasons import Reason


def put_back(world: Consortium, backup: Path) -> None:
    """Site 1 restarts with the journal as it was when ``backup`` was taken."""
    here = backup.parent / "site-1"
    world.journals[1].close()
    shutil.rmtree(here)
    shutil.copytree(backup, here)
    world.start(1)


def backed_up(world: Consortium, folder: Path) -> Path:
    shutil.copytree(folder / "site-1", folder / "backup")
    return folder / "backup"


def test_an_older_journal_answers_no_announcement_once_its_mark_is_known(tmp_path: Path) -> None:
    world = Consortium(3, folder=tmp_path)
    backup = backed_up(world, tmp_path)
    Stage(world, Phase.UNMASK)
    mark = world.sites[1].mark(STUDY)
    put_back(world, backup)
    world.sites[1].expect({STUDY: mark})
    with pytest.raises(PolicyRefusal, match="restore the newest one") as refusal:
        world.ask(1, Phase.ADVERTISE_KEYS, world.announcement())
    assert refusal.value.reason == Reason.JOURNAL_RESTORED
    world.sites[1].expect({STUDY: Head(0, mark.digest)})  # as far as this copy is
    world.ask(1, Phase.ADVERTISE_KEYS, world.announcement())


def test_an_older_journal_does_not_sign_a_second_list_of_survivors(tmp_path: Path) -> None:
    world = Consortium(5, folder=tmp_path)
    stage = Stage(world, Phase.MASKED_INPUT)
    backup = backed_up(world, tmp_path)
    world.ask(1, Phase.CONFIRM_SURVIVORS, stage.survivor_list)
    mark = world.sites[1].mark(STUDY)
    put_back(world, backup)
    world.sites[1].expect({STUDY: mark})
    with pytest.raises(PolicyRefusal) as refusal:
        world.ask(1, Phase.CONFIRM_SURVIVORS, SurvivorList(stage.context, (1, 2, 3, 4)))
    assert refusal.value.reason == Reason.JOURNAL_RESTORED


def test_a_journal_that_was_begun_anew_counts_as_an_older_one(tmp_path: Path) -> None:
    world = Consortium(3, folder=tmp_path)
    Stage(world, Phase.UNMASK)
    mark = world.sites[1].mark(STUDY)
    world.journals[1].close()
    shutil.rmtree(tmp_path / "site-1")
    world.start(1)
    world.sites[1].expect({STUDY: mark})
    with pytest.raises(PolicyRefusal) as refusal:
        world.ask(1, Phase.ADVERTISE_KEYS, world.announcement(round=99))
    assert refusal.value.reason == Reason.JOURNAL_RESTORED
    with pytest.raises(PolicyRefusal):
        world.sites[1].compare(STUDY, mark)


def test_another_study_goes_on(tmp_path: Path) -> None:
    world = Consortium(3, folder=tmp_path)
    world.sites[1].expect({b"\x77" * 32: Head(9, "ab" * 32)})
    world.ask(1, Phase.ADVERTISE_KEYS, world.announcement())


def test_the_audit_log_remembers_the_mark_of_every_answer_in_a_sum(tmp_path: Path) -> None:
    path, mark, study = tmp_path / "audit.jsonl", Head(3, "ab" * 32), "11" * 32
    audit = Audit(path)
    for number in (2, 3):
        audit.leaves(Passage("query.phase", study, phase="unmask"), Answer("phase"), form=Form.NOTHING,
                     journal=Head(number, mark.digest))  # fmt: skip
    audit.leaves(Passage("train", study), Answer("ready"), form=Form.NOTHING)
    assert audit.journal == {study: mark}
    audit.close()
    again = Audit(path)
    assert again.journal == {study: mark}
    again.close()


def test_the_coordinators_memory_of_the_mark_is_compared_before_a_round(tmp_path: Path) -> None:
    study = classes_study(secure_aggregation={"mode": "msa1"}, rounds={"count": 2, "minimum_sites": 3})
    world = Consortium(3)
    site = make_site(study, tmp_path, policy=policy_for(study))
    site._participant = Participant(world.sites[1])
    offer(site, study)
    first = site.compare_heads(HeadsRequest(study.digest, 1)).heads[Log.JOURNAL]
    assert first.rows == 0
    site.compare_heads(HeadsRequest(study.digest, 2, {Log.JOURNAL: first}))
    for seen in (Head(1, first.digest), Head(0, "ab" * 32)):
        with pytest.raises(PolicyRefusal) as refusal:
            site.compare_heads(HeadsRequest(study.digest, 2, {Log.JOURNAL: seen}))
        assert refusal.value.reason == Reason.JOURNAL_RESTORED
