"""Unpaired image captioning with CgT-GAN: an experiment suite."""

from typing import TYPE_CHECKING, Any

from cgtgan.runtime.versions import __version__

if TYPE_CHECKING:
    from cgtgan.captioning.captioner import Captioner

__all__ = ["Captioner", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Captioner":  # on first use: settings are checked before torch is imported
        from cgtgan.captioning.captioner import Captioner

        return Captioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
