"""What the comparisons share: real activations, the trained family, and the other libraries in their environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.peers.compare import Comparison, Peers
from tests.peers.family import Zoo, real_rows


@pytest.fixture(scope="session")
def peers() -> Peers:
    python = os.environ.get("SLUICE_PEERS_PYTHON")
    if python is None:
        pytest.skip("SLUICE_PEERS_PYTHON names no environment; run `make peers`")
    return Peers(Path(python))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(real_rows(), tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def comparison(peers: Peers, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Every SAE of the family in every format, loaded by the others."""
    return Comparison.of(peers, zoo, tmp_path_factory.mktemp("exports"))
