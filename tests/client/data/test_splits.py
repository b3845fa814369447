"""Splits are by patient, stable, balanced on small sites; the secret is private."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.client.data.secret import SiteKey, open_site_key
from medfl.client.data.settings import SplitSettings
from medfl.client.data.splits import Split, split_patients
from medfl.shared.errors import ConfigError, DataError

KEY = SiteKey(b"0123456789abcdef0123456789abcdef")
SHARES = SplitSettings(validation=0.15, test=0.15, min_patients=10)


def people(count: int) -> list[str]:
    return [KEY.pseudonym(f"patient {n}") for n in range(count)]


@given(st.integers(10, 49))
def test_a_small_site_gets_its_shares_exactly_and_never_an_empty_part(count: int) -> None:
    parts = Counter(split_patients(people(count), KEY, SHARES).values())
    held_out = max(1, round(0.15 * count))
    assert parts == {Split.TEST: held_out, Split.VALIDATION: held_out, Split.TRAIN: count - 2 * held_out}


def test_on_a_large_site_shares_are_right_on_average() -> None:
    parts = Counter(split_patients(people(10_000), KEY, SHARES).values())
    # a binomial share of 0.15 over 10,000 has a standard deviation of 36
    assert parts[Split.TEST] == pytest.approx(1500, abs=150)
    assert parts[Split.VALIDATION] == pytest.approx(1500, abs=150)


def test_on_a_large_site_new_patients_move_nobody() -> None:
    before, after = (split_patients(people(n), KEY, SHARES) for n in (60, 600))
    assert all(after[patient] is part for patient, part in before.items())


def test_a_part_of_share_zero_is_empty() -> None:
    shares = SplitSettings(validation=0.2, test=0)
    assert Split.TEST not in split_patients(people(20), KEY, shares).values()


def test_below_the_minimum_there_is_no_split() -> None:
    with pytest.raises(DataError, match="only 9 patients"):
        split_patients(people(9), KEY, SHARES)


def test_case_and_spaces_of_an_identifier_do_not_make_two_patients() -> None:
    assert KEY.pseudonym(" ab12 ") == KEY.pseudonym("AB12")
    assert KEY.pseudonym("AB12") != KEY.pseudonym("AB13")


def test_another_secret_gives_other_pseudonyms() -> None:
    assert SiteKey(b"x" * 32).pseudonym("AB12") != KEY.pseudonym("AB12")


def test_the_secret_does_not_show_in_its_representation() -> None:
    assert "0123456789" not in repr(KEY)


def test_a_secret_is_made_once_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "secret.key"
    first = open_site_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert open_site_key(path).material == first.material
    assert list(path.parent.iterdir()) == [path]


def test_what_a_process_killed_while_it_made_the_secret_left_is_removed(tmp_path: Path) -> None:
    made = (
        "import os, sys; from pathlib import Path; from medfl.client.data import secret;"
        "link = os.link; secret.os.link = lambda *names: (link(*names), os.kill(os.getpid(), 9));"
        "secret.open_site_key(Path(sys.argv[1]))"
    )
    path = tmp_path / "secret"
    assert subprocess.run([sys.executable, "-c", made, str(path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    material = path.read_bytes()
    assert open_site_key(path).material == material
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_start_together_agree_on_one_secret(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(open_site_key(tmp_path / "s").material)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    open_site_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_site_key(path)


def test_a_short_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="at least 32 bytes"):
        open_site_key(path)
