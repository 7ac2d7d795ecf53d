import pytest
from counting import CountingRunner


@pytest.fixture
def runner():
    return CountingRunner()
