"""The commands that an installation has: sluice-producer, sluice-trainer, sluice-monitor and sluice-demo.

Each begins by making sure that the packages it is about to import are Sluice's.
"""

from __future__ import annotations

from importlib import import_module

from producer.common.installation import require_own_packages


def producer() -> int:
    return _main_of("producer.__main__")


def trainer() -> int:
    return _main_of("trainer.__main__")


def monitor() -> int:
    return _main_of("monitor.__main__")


def demo() -> int:
    return _main_of("deploy.demo")


def _main_of(module: str) -> int:
    require_own_packages()
    return int(import_module(module).main())
