import pytest

from overfill.testing.counting import CountingRunner


@pytest.fixture
def runner():
    return CountingRunner()
