"""A sweep as jobs, of SLURM or of this machine: what hydra_plugins/cgtgan_launcher.py starts. Imports no torch."""
