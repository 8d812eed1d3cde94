"""Running Sluice: the demo, run files, and files for the systems that start processes (docs/deployment.md).

demo       `sluice-demo`, `make demo`
commands   what an installation's scripts call
"""
