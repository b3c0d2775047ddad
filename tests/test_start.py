"""What starting a program does not import, and that it is there for who needs it."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxft.models.e3nn import postponed

NAME = "xml.sax.handler"


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    """As if a submodule that nobody here uses had never been imported."""
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield
    sys.modules.pop(NAME, None)


def test_jaxft_loads_no_signal_processing_and_others_can():
    program = """
        import sys
        import jaxft, jaxft.run, jaxft.cli
        assert "scipy.signal" not in sys.modules
        from e3nn_jax._src import s2grid
        assert s2grid.scipy.signal.find_peaks([0, 1, 0])[0].tolist() == [1]
        import jax.scipy.signal, scipy.signal
        assert scipy.signal.__file__
        assert jax.scipy.signal.convolve(jax.numpy.ones(2), jax.numpy.ones(2)).tolist() == [1, 2, 1]
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=Path(__file__).parents[1]
    )


def test_what_is_postponed_is_loaded_after_the_block():
    with postponed(NAME):
        handler = importlib.import_module(NAME)
    assert NAME not in sys.modules
    assert "ContentHandler" not in vars(handler)
    assert handler.ContentHandler.__module__ == NAME
    assert sys.modules[NAME].__file__


def test_what_is_used_inside_the_block_is_loaded_there():
    """By this thread, or by another that knows nothing of it."""
    with postponed(NAME):
        from xml.sax.handler import ContentHandler
    assert ContentHandler.__module__ == NAME
    assert sys.modules[NAME].ContentHandler is ContentHandler


def test_what_is_loaded_already_stays():
    before = importlib.import_module(NAME)
    with postponed(NAME):
        assert sys.modules[NAME] is before
    assert sys.modules[NAME] is before
