"""Unpaired image captioning with CgT-GAN: an experiment suite."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cgtgan.captioner import Captioner

__version__ = "0.1.0"
__all__ = ["Captioner", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Captioner":  # loaded when asked for: the settings are checked before torch is there
        from cgtgan.captioner import Captioner

        return Captioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
