"""What starting a program does not import, and that it is there for who needs it."""

import importlib
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxft.postponed import postponed

NAME = "xml.sax.handler"


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    """As if a submodule that nobody here uses had never been imported."""
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield
    sys.modules.pop(NAME, None)


def run(program: str) -> None:
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=root)


def test_jaxft_loads_neither_scipy_nor_sympy_nor_orbax_and_others_can():
    run("""
        import sys
        import jaxft, jaxft.run, jaxft.cli
        for name in ("signal", "spatial", "integrate", "optimize", "sparse", "linalg", "special"):
            assert f"scipy.{name}" not in sys.modules, name
        assert not {"sympy", "mpmath", "orbax.checkpoint", "tensorstore"} & set(sys.modules)
        from e3nn_jax._src import s2grid
        assert s2grid.scipy.signal.find_peaks([0, 1, 0])[0].tolist() == [1]
        assert s2grid.scipy.spatial.distance.cdist([[0.0]], [[2.0]]).tolist() == [[2]]
        import ase.dft
        assert ase.dft.trapezoid([1.0, 1.0]) == 1
        import jax.scipy.signal, scipy.signal, scipy.spatial, scipy.integrate
        assert scipy.signal.__file__ and scipy.spatial.__file__ and scipy.integrate.__file__
        assert jax.scipy.signal.convolve(jax.numpy.ones(2), jax.numpy.ones(2)).tolist() == [1, 2, 1]
    """)


@pytest.mark.parametrize("first", ["import sympy", "import jaxft"])
def test_sympy_is_one_module_whoever_imports_it_first(first):
    run(f"""
        {first}
        import jaxft
        from e3nn_jax._src.spherical_harmonics import recursive
        degree_1 = recursive.recursive_spherical_harmonics(1, {{1: 0}}, None, "component", ())
        import sympy
        from sympy import Array
        assert sympy.__file__ and isinstance(degree_1, Array) and Array is sympy.Array
        assert recursive.sympy.Array is Array
    """)


def test_the_command_does_not_look_for_garbage_in_what_it_imports():
    run("""
        import gc, os, sys
        os.environ["JAXFT_HUGE_PAGES"] = "off"
        sys.argv = ["/usr/bin/jaxft"]
        import jaxft
        assert gc.isenabled() and gc.get_freeze_count() > 100_000
    """)


def test_the_library_leaves_the_garbage_collector_alone():
    run("""
        import gc
        import jaxft
        assert gc.isenabled() and gc.get_freeze_count() == 0
    """)


def test_what_is_postponed_is_loaded_after_the_block():
    with postponed(NAME):
        handler = importlib.import_module(NAME)
    assert NAME not in sys.modules
    assert "ContentHandler" not in vars(handler)
    assert handler.ContentHandler.__module__ == NAME
    assert sys.modules[NAME].__file__


def test_a_name_of_what_is_postponed_loads_it_when_called():
    with postponed(NAME):
        from xml.sax.handler import ContentHandler

        def annotated(x: ContentHandler) -> None: ...

    assert NAME not in sys.modules
    assert repr(annotated.__annotations__["x"]) == f"{NAME}.ContentHandler"
    assert type(ContentHandler()) is sys.modules[NAME].ContentHandler


def test_a_name_of_what_is_postponed_is_no_class():
    with postponed(NAME):
        from xml.sax.handler import ContentHandler
    with pytest.raises(TypeError):
        isinstance(0, ContentHandler)
    with pytest.raises(TypeError):
        type("Derived", (ContentHandler,), {})


def test_what_is_called_inside_the_block_is_loaded_there():
    with postponed(NAME):
        from xml.sax.handler import ContentHandler

        handler = ContentHandler()
    assert type(handler) is sys.modules[NAME].ContentHandler


def test_another_thread_gets_the_module_itself():
    def other() -> type:
        from xml.sax.handler import ContentHandler

        return ContentHandler

    with postponed(NAME), ThreadPoolExecutor(1) as pool:
        found = pool.submit(other).result()
    assert found.__module__ == NAME
    assert sys.modules[NAME].ContentHandler is found


def test_what_is_loaded_already_stays():
    before = importlib.import_module(NAME)
    with postponed(NAME):
        assert sys.modules[NAME] is before
    assert sys.modules[NAME] is before
