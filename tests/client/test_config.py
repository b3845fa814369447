"""The policy may stand in a file that only root can change; anything else about that file is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medfl.client import config
from medfl.client.config import load_policy, load_site
from medfl.shared.errors import ConfigError

SITE = "site: north\nkeys: keys\nstate: state\ndata: {source: dicom, folder: images}\n"


@pytest.fixture(autouse=True)
def owned_by_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests stands for root."""
    real, me = os.fstat, os.getuid()

    def fstat(descriptor: int) -> os.stat_result:
        about = list(real(descriptor))
        about[4] = 0 if about[4] == me else 1000
        return os.stat_result(about)

    monkeypatch.setattr(config.os, "fstat", fstat)


def policy_file(folder: Path, text: str = "max_epsilon_total: 3\n", mode: int = 0o644) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text)
    path.chmod(mode)
    return path


def site_file(folder: Path, more: str) -> Path:
    path = folder / "site.yaml"
    path.write_text(SITE + more)
    return path


def test_the_rules_of_a_separate_file_are_the_sites(tmp_path: Path) -> None:
    policy_file(tmp_path)
    assert load_site(site_file(tmp_path, "policy_file: policy.yaml\n")).policy.max_epsilon_total == 3


def test_two_sets_of_rules_are_refused(tmp_path: Path) -> None:
    policy_file(tmp_path)
    with pytest.raises(ConfigError, match="policy or policy_file, not both"):
        load_site(site_file(tmp_path, "policy_file: policy.yaml\npolicy: {max_epsilon_total: 8}\n"))


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_policy_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="others than root could change the policy"):
        load_policy(policy_file(tmp_path, mode=mode))


def test_a_policy_that_another_account_owns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.os, "fstat", lambda descriptor: os.stat_result((0o100644, 0, 0, 1, 1000, 0, 0, 0, 0, 0)))
    with pytest.raises(ConfigError, match="chown root"):
        load_policy(policy_file(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [("max_epsilon: 3\n", r"policy.yaml:1:1: max_epsilon: .*did you mean"), ("", "is empty"), ("\xff", "not UTF-8")],
)
def test_a_policy_that_is_none_is_refused_and_never_taken_as_empty(tmp_path: Path, text: str, said: str) -> None:
    path = policy_file(tmp_path)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=said):
        load_policy(path)


def test_a_policy_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_site(site_file(tmp_path, "policy_file: none.yaml\n"))
