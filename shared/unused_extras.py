"""MONAI tries every library it could use when it is imported; those that MedFL never asks it for are declined.

That is 1.4 s of each process's start where the development extras are installed, and 700 modules of memory. MONAI
then behaves as where they are not installed. The libraries stay importable for everybody else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

DECLINED = frozenset(
    (
        *("cv2", "ignite", "itk", "jsonschema", "matplotlib", "mlflow", "nibabel", "nrrd", "onnx", "pandas", "pydicom"),
        *("requests", "scipy.signal", "skimage", "sklearn", "tensorboard", "tensorboardX", "tifffile"),
        *("torch.utils.tensorboard", "torchvision", "tqdm", "transformers"),
    )
)


class Decline(MetaPathFinder):
    """Raises ModuleNotFoundError for the names of :data:`DECLINED` when a module of MONAI asks for them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None (the next finder is asked) for everybody but MONAI."""
        if fullname in DECLINED and _asking().split(".")[0] == "monai":
            raise ModuleNotFoundError(f"MedFL does not use MONAI's {fullname}", name=fullname)
        return None


def _asking() -> str:
    """Name of the module whose import statement (or call) led here."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("importlib", "_frozen_importlib"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


def install() -> None:
    """Decline from now on, in this process; a second call changes nothing."""
    if not any(isinstance(finder, Decline) for finder in sys.meta_path):
        sys.meta_path.insert(0, Decline())
