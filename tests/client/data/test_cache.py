"""The cache gives back exactly what was put, to nobody else, never grows over its quota and heals itself."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from dicom_lab import KEY, ct, hospital, hounsfield, save, seg, spec
from hypothesis import given
from hypothesis import strategies as st

from medfl.client.data import ingest
from medfl.client.data import load as loading
from medfl.client.data.cache import EncryptedCache
from medfl.client.data.dicom_cases import SeriesCase
from medfl.client.data.files import read_file
from medfl.client.data.ingest import Block, LeftOut, pack, unpack
from medfl.client.data.load import load_site_data, without_opted_out
from medfl.client.data.memo import FileMemo
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import DicomSettings
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.shared.errors import DataError

ForkedPool = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("fork"))


def cache(folder: Path, key: SiteKey = KEY, quota: int = 10**6) -> EncryptedCache:
    return EncryptedCache.open(folder, key, quota)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.enc"))


@given(content=st.binary(max_size=5000))
def test_what_was_put_comes_back(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    kept = cache(tmp_path_factory.mktemp("c"))
    kept.put("a", content)
    assert kept.get("a") == content
    assert kept.get("b") is None


def test_the_disk_shows_neither_content_nor_address(tmp_path: Path) -> None:
    cache(tmp_path).put("an address that must not show", b"content that must not show" * 10)
    (path,) = entries(tmp_path)
    assert b"must not show" not in path.read_bytes()
    assert "must" not in path.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_secret_opens_nothing(tmp_path: Path) -> None:
    cache(tmp_path).put("a", b"secret")
    other = cache(tmp_path, SiteKey(b"o" * 32))
    assert other.get("a") is None
    (path,) = entries(tmp_path)
    path.rename(other._path("a"))  # even under the name that it would look for
    assert other.get("a") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "swap"])
def test_a_damaged_entry_is_as_good_as_absent_and_is_removed(damage: str, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    kept.put("a", b"x" * 100)
    (path,) = entries(tmp_path)
    content = path.read_bytes()
    if damage == "swap":  # a valid entry under another's name
        kept.put("b", b"y" * 100)
        os.replace(kept._path("b"), path)
    else:
        spoilt = {
            "flip": content[:50] + bytes([content[50] ^ 1]) + content[51:],
            "truncate": content[:60],
            "empty": b"",
        }
        path.write_bytes(spoilt[damage])
    assert kept.get("a") is None
    assert not path.exists()


def test_the_least_recently_used_go_first_when_the_quota_is_reached(tmp_path: Path) -> None:
    kept = cache(tmp_path, quota=3500)
    for number in range(5):
        kept.put(str(number), bytes(1000))
        os.utime(kept._path(str(number)), (number, number))
    kept.get("0")  # used again: now the newest
    kept.evict()
    # each takes 1000 bytes, 12 of nonce and 16 of tag: three fit
    assert [name for name in "01234" if kept._path(name).exists()] == ["0", "3", "4"]


def test_what_is_larger_than_the_quota_is_not_kept(tmp_path: Path) -> None:
    kept = cache(tmp_path, quota=50)
    kept.put("a", bytes(100))
    assert entries(tmp_path) == []


def busy_with(folder: Path, seed: int) -> list[bytes]:
    """What was read wrongly while entries were written, read and evicted."""
    kept, wrong = cache(folder, quota=8000), []
    for step in range(60):
        name = str((seed + step) % 7)
        found = kept.get(name)
        if found is None:
            kept.put(name, name.encode() * 2000)
        elif found != name.encode() * 2000:
            wrong.append(found)
        if step % 10 == 0:
            kept.evict()
    return wrong


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ForkedPool])
def test_threads_and_processes_that_write_read_and_evict_at_once_never_see_anything_wrong(
    tmp_path: Path, pool: Callable[[int], Executor]
) -> None:
    with pool(4) as workers:
        assert list(workers.map(partial(busy_with, tmp_path), range(4))) == [[], [], [], []]


@pytest.mark.parametrize("masks", [None, torch.ones(2, 3, 3, dtype=torch.uint8)])
def test_a_block_packs_and_unpacks(masks: torch.Tensor | None) -> None:
    label = frozenset({1, 2}) if masks is None else None
    block = Block(torch.rand(2, 1, 3, 3), masks, label, (1.0, 2.0), (-5.0, 7.0), ("look",), ("GTV",))
    again = unpack(pack(block))
    assert isinstance(again, Block)
    assert torch.equal(again.images, block.images)
    assert (again.label, again.spacing_mm, again.intensity) == (block.label, block.spacing_mm, block.intensity)
    assert (again.review, again.unmatched) == (block.review, block.unmatched)
    for why in (LeftOut("missing slices"), LeftOut("no segment is a class of the study", ("Leber",))):
        assert unpack(pack(why)) == why
    assert unpack(b"nonsense" * 9) is None


def load(folder: Path, cached: Path | None, **changes: object) -> SiteData:
    settings = DicomSettings.model_validate({"source": "dicom", "folder": folder} | changes)
    return load_site_data(settings, spec(), task="segmentation", key=KEY, cache_dir=cached)


def same(one: SiteData, two: SiteData) -> bool:
    return all(
        torch.equal(getattr(one.splits[p], n), getattr(two.splits[p], n)) for p in Split for n in ("images", "labels")
    )


def test_a_second_start_reads_no_image_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital(tmp_path / "data")
    gap = ct(name="GAP")
    save([*gap[:2], *gap[3:], seg(gap)], tmp_path / "data" / "gap")
    plain, first = load(tmp_path / "data", None), load(tmp_path / "data", tmp_path / "cache")

    def unreachable(*arguments: object) -> None:
        raise AssertionError("a file was read again")

    monkeypatch.setattr(SeriesCase, "read", unreachable)
    monkeypatch.setattr("medfl.client.data.headers.read_file", unreachable)
    monkeypatch.setattr("medfl.client.data.memo.content_digest", unreachable)
    second = load(tmp_path / "data", tmp_path / "cache")
    assert same(plain, first)
    assert same(first, second)
    assert second.report.quarantined == {"missing slices": 1}
    assert second.report.subgroups == plain.report.subgroups


class Killed(BaseException):
    """Stands for a kill."""


def killed_at(case: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], None]:
    """Progress that ends all at ``case``; as after a kill, nothing is saved then."""

    def progress(what: str, done: int, total: int) -> None:
        if what == "reading images" and done == case:
            monkeypatch.setattr(FileMemo, "save", lambda memo: None)
            raise Killed

    return progress


def test_a_first_start_that_is_killed_leaves_all_headers_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital(tmp_path / "data", patients=11)
    settings = DicomSettings(source="dicom", folder=tmp_path / "data")
    start = partial(load_site_data, settings, spec(), task="segmentation", key=KEY, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        start(progress=killed_at(5, patch))
    monkeypatch.setattr("medfl.client.data.headers.read_file", None)
    assert start().report.patients == 11


def test_what_is_learnt_is_saved_from_time_to_time_and_takes_a_fiftieth_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{number}" for number in range(4)]
    for path in files:
        path.write_text("x")
    now = [0.0]
    kept = cache(tmp_path / "cache")
    puts: list[float] = []

    def slow(into: EncryptedCache, address: str, content: bytes) -> None:
        puts.append(now[0])
        now[0] += 10  # seconds

    monkeypatch.setattr("medfl.client.data.memo.time.monotonic", lambda: now[0])
    monkeypatch.setattr(EncryptedCache, "put", slow)
    memo = FileMemo.load(kept, "")
    # due at 180; that takes 10 of at least 500 seconds, so the next one is due at 190 + 500
    for path, moment in zip(files, (179.0, 180.0, 689.0, 690.0), strict=True):
        now[0] = moment
        memo.digest(path)
    assert puts == [180.0, 690.0]
    memo.digest(files[0])
    memo.save()
    assert puts == [180.0, 690.0]  # nothing was learnt since


@pytest.mark.parametrize("gone", ["site", "study"])
def test_without_the_sites_secret_or_the_studys_key_nothing_cached_is_used(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital(tmp_path / "data", patients=11)
    (tmp_path / "out.txt").write_text("")
    settings = DicomSettings(source="dicom", folder=tmp_path / "data", opt_out=tmp_path / "out.txt")
    read: list[str] = []
    real = SeriesCase.read
    monkeypatch.setattr(SeriesCase, "read", lambda case: (read.append(case.patient), real(case))[1])

    def start(site: SiteKey, study: SiteKey) -> SiteData:
        read.clear()
        cached = tmp_path / "cache"
        return load_site_data(settings, spec(), task="segmentation", key=site, cache_key=study, cache_dir=cached)

    key, other = SiteKey(b"s" * 32), SiteKey(b"o" * 32)
    start(KEY, key)
    start(KEY, key)
    assert read == []
    (tmp_path / "out.txt").write_text("P05")
    keys = {"site": (other, key), "study": (KEY, other)}[gone]
    data = start(*keys)
    assert len(read) == 10
    assert data.report.quarantined == {"opted out": 7}  # the new secret's pseudonyms are asked for


@pytest.mark.parametrize("where", ["headers", "pixels"])
@pytest.mark.parametrize("fault", [OSError(errno.ESTALE, "Stale file handle"), MemoryError()])
def test_whom_a_passing_fault_left_out_is_there_again_at_the_next_start(
    fault: Exception, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital(tmp_path / "data", patients=11)
    files = (tmp_path / "data" / "05").iterdir()

    def failing(path: Path, **options: object) -> object:
        if path.parent.name == "05":
            raise fault
        return read_file(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"medfl.client.data.{where}.read_file", failing)
        report = load(tmp_path / "data", tmp_path / "cache").report
    reason = "not enough memory" if isinstance(fault, MemoryError) else "file that cannot be read"
    assert report.patients == 10
    assert report.quarantined == {reason: len(list(files)) if where == "headers" else 1}
    report = load(tmp_path / "data", tmp_path / "cache").report
    assert (report.patients, report.quarantined) == (11, {})


def test_a_file_that_no_reader_understands_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = hospital(tmp_path / "data", patients=11)
    paths[0].write_bytes(b"no DICOM")
    first = load(tmp_path / "data", tmp_path / "cache").report
    monkeypatch.setattr("medfl.client.data.headers.read_file", None)
    monkeypatch.setattr(SeriesCase, "read", None)
    again = load(tmp_path / "data", tmp_path / "cache").report
    assert first.quarantined["not a DICOM file"] == 1
    assert again.quarantined == first.quarantined


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    load(tmp_path / "data", tmp_path / "cache")
    series = ct(hounsfield(77), name="P03")
    for path in (tmp_path / "data" / "03").iterdir():
        path.unlink()
    save([*series, seg(series)], tmp_path / "data" / "03")
    again = load(tmp_path / "data", tmp_path / "cache")
    assert same(again, load(tmp_path / "data", None))


def test_other_preprocessing_is_another_address(tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    load(tmp_path / "data", tmp_path / "cache")
    other = spec(preprocessing={"normalise": "zscore", "size": (32, 32)})
    settings = DicomSettings(source="dicom", folder=tmp_path / "data")
    cached, plain = (
        load_site_data(settings, other, task="segmentation", key=KEY, cache_dir=c) for c in (tmp_path / "cache", None)
    )
    assert same(cached, plain)


def test_a_cache_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    first = load(tmp_path / "data", tmp_path / "cache")
    for number, path in enumerate(entries(tmp_path / "cache")):
        path.write_bytes(path.read_bytes()[: 40 * number])
    assert same(first, load(tmp_path / "data", tmp_path / "cache"))
    assert same(first, load(tmp_path / "data", tmp_path / "cache"))


def test_someone_who_opts_out_is_gone_from_a_warm_cache(tmp_path: Path) -> None:
    hospital(tmp_path / "data", patients=11)
    load(tmp_path / "data", tmp_path / "cache")
    (tmp_path / "out.txt").write_text("P05")
    data = load(tmp_path / "data", tmp_path / "cache", opt_out=tmp_path / "out.txt")
    assert KEY.pseudonym("P05") not in data.pseudonyms
    assert data.report.patients == 10


def test_someone_who_opts_out_between_rounds_is_gone_from_the_tensors(tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    listed = tmp_path / "out.txt"
    listed.write_text("")
    settings = DicomSettings(source="dicom", folder=tmp_path / "data", opt_out=listed)
    data = load_site_data(settings, spec(), task="segmentation", key=KEY)
    assert without_opted_out(data, settings, KEY).splits[Split.TRAIN] is data.splits[Split.TRAIN]
    number = int(data.splits[Split.TRAIN].patients[0])
    name = next(f"P{n:02d}" for n in range(10) if KEY.pseudonym(f"P{n:02d}") == data.pseudonyms[number])
    listed.write_text(name.lower())
    left = without_opted_out(data, settings, KEY).splits[Split.TRAIN]
    assert len(left) == 30
    assert number not in left.patients
    listed.write_text("\n".join(f"P{n:02d}" for n in range(10)))
    with pytest.raises(DataError, match="all have opted out"):
        without_opted_out(data, settings, KEY)


@pytest.mark.slow  # each worker imports torch and MONAI
def test_worker_processes_give_the_same_in_the_same_order(tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    alone = load(tmp_path / "data", None)
    assert same(alone, load(tmp_path / "data", None, workers=2))


class Fatal:
    """A case whose worker is gone as soon as it comes there."""

    patient, files, fingerprint, attributes = "someone", (), "", {}

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return os.abort, ()


@pytest.mark.slow  # each worker imports torch and MONAI
def test_a_worker_that_is_killed_is_told_in_words_and_what_was_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital(tmp_path / "data")
    with monkeypatch.context() as patch:
        found = loading.find_cases
        patch.setattr(loading, "find_cases", lambda *given: [*found(*given), Fatal()])
        with pytest.raises(DataError, match=r"memory runs out: lower data\.workers, which is 2"):
            load(tmp_path / "data", tmp_path / "cache", workers=2)
    read: list[str] = []
    real = SeriesCase.read
    monkeypatch.setattr(SeriesCase, "read", lambda case: (read.append(case.patient), real(case))[1])
    monkeypatch.setattr("medfl.client.data.headers.read_file", None)  # headers are known too
    load(tmp_path / "data", tmp_path / "cache")
    assert len(read) <= 2  # the window behind the last block that was taken


def test_blocks_wait_for_no_more_cases_than_workers() -> None:
    from concurrent.futures import ThreadPoolExecutor

    started: list[int] = []

    class Recording:
        files, fingerprint = (), ""

        def __init__(self, number: int) -> None:
            self.number = number

        def run(self) -> str:
            started.append(self.number)
            return str(self.number)

    with ThreadPoolExecutor(2) as pool:
        window = ingest._window([Recording(n) for n in range(50)], 2, pool, None, None)  # type: ignore[misc]
        assert next(window).result() == "0"
        assert max(started) <= 3
        assert [pending.result() for pending in window] == [str(n) for n in range(1, 50)]
