"""Conversion and prediction need no torch: not installed, not imported, even where it is there."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "benchmarks" / "data" / "gfn2_small.model"

PROGRAM = """
    import sys

    class Forbid:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"torch", "mace", "e3nn"}:
                raise ModuleNotFoundError(f"No module named {name!r}, says the test", name=name)

    sys.meta_path.insert(0, Forbid())

    import numpy as np
    import jax
    from converters.to_jax import convert
    from jaxft import data, predict
    from jaxft.data import Frame

    for path in sys.argv[1:]:
        model, params = convert(path)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
        positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.8, 0.6], [0.0, -0.8, 0.6]])
        water = Frame(np.array([8, 1, 1]), positions, np.zeros((3, 3)), (False, False, False))
        (batch,) = data.epoch(data.prepare([water], model), 1)
        out = jax.jit(lambda params, graph: predict(model, params, graph))(params, batch.graph)
        forces = np.asarray(out.forces)[:3]
        assert np.isfinite(forces).all() and np.abs(forces).max() > 1e-3, forces
        assert np.abs(forces.sum(axis=0)).max() < 1e-4, forces

    from converters.to_torch import export

    try:
        export((model, params), sys.argv[1] + ".back")
    except ImportError as error:
        assert "pip install 'jaxft[torch]'" in str(error), error
    else:
        raise AssertionError("torch was forbidden")
    assert not {"torch", "mace", "e3nn"} & sys.modules.keys()
    print("done")
"""


def test_a_model_is_converted_and_run_where_torch_cannot_be_imported(tiny_file):
    files = [tiny_file, SHIPPED]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


def test_converters_import_no_torch():
    """Where torch is installed, importing every converter and jaxft leaves it alone."""
    program = (
        "import sys, converters.to_jax, converters.to_torch, converters.verify, jaxft.data; "
        "assert not {'torch', 'mace', 'e3nn'} & sys.modules.keys()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
