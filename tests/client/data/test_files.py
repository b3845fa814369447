"""Files that would take all memory are left out before they do."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_lab import KEY, ct, save
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medfl.client.data import decoder, files
from medfl.client.data.case import Quarantine
from medfl.client.data.files import read_file
from medfl.client.data.headers import Reader
from medfl.client.data.nifti import read_nifti
from medfl.client.data.pixels import open_dataset, open_series


def deflated(folder: Path) -> Path:
    source = ct()[:1]
    source[0].file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return save(source, folder)[0]


def bomb(folder: Path, size: int) -> Path:
    """A deflated file whose dataset ends with ``size`` zeros."""
    path = deflated(folder)
    content = path.read_bytes()
    with path.open("rb") as file:
        pydicom.filereader.read_preamble(file, force=False)
        pydicom.filereader.read_dataset(file, False, True, stop_when=lambda tag, *_: tag.group != 2)
        start = file.tell()
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    packed = [packer.compress(zlib.decompress(content[start:], -zlib.MAX_WBITS))]
    packed += [packer.compress(bytes(2**20)) for _ in range(size // 2**20)]
    path.write_bytes(content[:start] + b"".join(packed) + packer.flush())
    return path


def test_a_file_that_inflates_without_bound_is_left_out_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MOST_INFLATED", 32 * 2**20)
    path = bomb(tmp_path, 256 * 2**20)
    assert path.stat().st_size < 2**20
    for read in (Reader(KEY).read, open_dataset):
        tracemalloc.start()
        with pytest.raises(Quarantine, match="deflated file that becomes too large"):
            read(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * 2**20


def test_the_length_of_a_deflated_file_is_its_datasets(tmp_path: Path) -> None:
    path = deflated(tmp_path)
    plain = ct()[0]
    # 32 x 32 pixels of 2 bytes, and what describes them
    assert 2048 < read_file(path)[1] < 2048 + 2000
    assert open_dataset(path).PixelData == plain.PixelData


def test_a_file_larger_than_any_scan_is_not_read(tmp_path: Path) -> None:
    (path,) = save(ct()[:1], tmp_path)
    with path.open("r+b") as file:
        file.truncate(2**32 + 1)  # a hole: it takes no room on the disk
    for read in (Reader(KEY).read, open_dataset):
        with pytest.raises(Quarantine, match="file larger than any scan"):
            read(path)


def test_a_nifti_file_that_claims_hundreds_of_gigabytes_is_left_out(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    image.header["xyzt_units"] = 2
    nib.save(image, tmp_path / "small.nii")
    content = bytearray((tmp_path / "small.nii").read_bytes())
    content[42:48] = np.array([4000, 4000, 4000], "<i2").tobytes()  # dim[1..3]
    (tmp_path / "large.nii.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(Quarantine, match="NIfTI file larger than any scan"):
        read_nifti(tmp_path / "large.nii.gz")


def test_pixels_that_decode_to_more_than_any_scan_are_left_out(tmp_path: Path) -> None:
    (dataset,) = source = ct()[:1]
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.Rows = dataset.Columns = 65535
    with pytest.raises(Quarantine, match="pixels that decode to more than any scan"):
        open_series(save(source, tmp_path))
    assert decoder._pool is None  # nobody has tried
