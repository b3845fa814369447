"""What MONAI would import and MedFL never asks it for."""

from __future__ import annotations

import subprocess
import sys

from medfl.shared.unused_extras import DECLINED


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_monai_comes_without_the_libraries_that_it_is_never_asked_to_use() -> None:
    code = (
        "import sys, medfl.shared.environment, monai.networks.nets.unet, monai.losses.dice, monai.data.meta_tensor\n"
        f"print(sorted({set(DECLINED)!r} & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_they_stay_importable_for_everybody_else_before_and_after_monai() -> None:
    code = (
        "import medfl.shared.environment, scipy.signal, monai.losses.dice, nibabel, pydicom, skimage.measure\n"
        "print(scipy.signal.hilbert([0.0, 1.0]).size, nibabel.Nifti1Image.__name__, skimage.measure.label.__name__)"
    )
    assert run(code) == "2 Nifti1Image label"


def test_a_module_named_like_monai_is_not_taken_for_it() -> None:
    code = (
        "import medfl.shared.environment, types\n"
        "module = types.ModuleType('monailike')\n"
        "exec('import skimage', module.__dict__)\n"
        "print(module.skimage.__name__)"
    )
    assert run(code) == "skimage"
