"""Unpaired image captioning with CgT-GAN: an experiment suite."""

__version__ = "0.1.0"
