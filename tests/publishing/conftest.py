"""What the tests of publishing share."""

import pytest
from hub_server import HubServer


@pytest.fixture
def hub():
    """A hub on loopback, empty."""
    with HubServer().running() as server:
        yield server
