"""Fine-tuning machine-learning interatomic potentials in JAX.

Units are eV, Å, eV/Å and eV/Å³ throughout; stress has ASE's sign (positive under tension).
"""

import gc

from jaxft import hugepages

if hugepages.is_command():
    hugepages.restart()  # before the imports, which take seconds
    gc.disable()  # imports leave nothing to collect, and looking for it is a fifth of their time

from jaxft.bundle import load, save
from jaxft.citation import citation
from jaxft.describe import describe
from jaxft.evaluate.pseudolabel import pseudolabel
from jaxft.fisher import fisher
from jaxft.fisher import sampled as sampled_fisher
from jaxft.potential import Potential, predict
from jaxft.train import finetune, merge
from jaxft.tree import interpolate
from jaxft.version import __version__

if hugepages.is_command():
    gc.freeze()  # what is imported stays, and need not be looked at again and again
    gc.enable()

__all__ = [
    "Potential",
    "__version__",
    "citation",
    "describe",
    "finetune",
    "fisher",
    "interpolate",
    "load",
    "merge",
    "predict",
    "pseudolabel",
    "sampled_fisher",
    "save",
]
