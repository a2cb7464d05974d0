"""A sweep as jobs: what the Hydra launchers of `hydra_plugins/cgtgan_launcher.py` do, before, beside and inside a job. Imports no torch."""
