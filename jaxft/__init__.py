"""Fine-tuning machine-learning interatomic potentials in JAX.

Units are eV, Å, eV/Å and eV/Å³ throughout; stress has ASE's sign (positive under tension).
"""

from jaxft.bundle import load, save
from jaxft.describe import describe
from jaxft.fisher import fisher
from jaxft.potential import Potential, predict
from jaxft.train import finetune, merge
from jaxft.version import __version__

__all__ = [
    "Potential",
    "__version__",
    "describe",
    "finetune",
    "fisher",
    "load",
    "merge",
    "predict",
    "save",
]
