"""The published MACE models that predict energies: where they are, their licence, their digest.

The table is data; :mod:`converters.registry` resolves names and fetches files. Names, files and
URLs are those of mace-torch 0.3.16 (``mace/calculators/foundations_models.py``), except OFF23b and
OFF24, which that list lacks and the repository ACEsuit/mace-off holds.

Digests have two origins, told apart by :attr:`Published.sha256_from`: the MACE authors' own
reference figures (``tests/golden`` of ACEsuit/mace), and third parties' public lists of pinned
releases, which agree with the authors' where both have a file. Sizes come from such lists too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ASL_URL = "https://github.com/gabor1/ASL"

_MP_URL = "https://github.com/ACEsuit/mace-mp/releases/download"
_FOUNDATIONS_URL = "https://github.com/ACEsuit/mace-foundations/releases/download"
_OFF_URL = "https://raw.githubusercontent.com/ACEsuit/mace-off/main"

_MP = "Batatia et al., A foundation model for atomistic materials chemistry, arXiv:2401.00096"
_MH = (
    "Batatia, Lin, Hart, Kasoar, Elena, Norwood, Wolf, Csányi, Cross Learning between Electronic "
    "Structure Theories for Unifying Molecular, Surface, and Inorganic Crystal Foundation Force "
    "Fields, arXiv:2510.25380"
)
_OFF = "Kovács et al., arXiv:2312.15211"
_OMOL = (
    "ACEsuit/mace-foundations, release mace_omol_0 (its authors ask to cite 'the relevant OMOL "
    "paper' and name none)"
)
_ANICC = (
    "Kovács, Batatia, Arany, Csányi, Evaluation of the MACE Force Field Architecture, J. Chem. "
    "Phys. (2023), doi:10.1063/5.0155322"
)


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
      name: Canonical, e.g. ``"mace-mp-0b3-medium"``.
      aliases: Other names, mace-torch's own keys among them.
      file: Its name.
      url: Where its authors publish it.
      licence: Of the weights: ``"MIT"``, or ``"ASL"``, the Academic Software Licence.
      citation: One line.
      family: Architecture and elements, in words.
      licence_url: The text of a licence that must be accepted, else None.
      size: Bytes, where a source states them.
      sha256: In hexadecimal, where a source states it.
      sha256_from: That source: ``"authors"``, or ``"reported"`` by a third party.
    """

    name: str
    aliases: tuple[str, ...]
    file: str
    url: str
    licence: Literal["MIT", "ASL"]
    citation: str
    family: str
    licence_url: str | None = None
    size: int | None = None
    sha256: str | None = None
    sha256_from: Literal["authors", "reported"] | None = None


def _row(
    name: str,
    url: str,
    family: str,
    citation: str,
    *,
    aliases: tuple[str, ...] = (),
    academic: bool = False,
    authors: str | None = None,
    reported: str | None = None,
    size: int | None = None,
) -> Published:
    return Published(
        name=name,
        aliases=aliases,
        file=url.rpartition("/")[2],
        url=url,
        licence="ASL" if academic else "MIT",
        citation=citation,
        family=family,
        licence_url=ASL_URL if academic else None,
        size=size,
        sha256=authors or reported,
        sha256_from="authors" if authors else "reported" if reported else None,
    )


_ROWS = (
    _row(
        "mace-mp-0-small",
        f"{_MP_URL}/mace_mp_0/2023-12-10-mace-128-L0_energy_epoch-249.model",
        "residual blocks, 128x0e, r_max 6 Å, 89 elements",
        _MP,
        aliases=("small",),
        authors="2ddb079cee0e131eaaf6912ba581b394551ead283e95c99cfe78c605d10b5736",
        size=32_581_838,
    ),
    _row(
        "mace-mp-0-medium",
        f"{_MP_URL}/mace_mp_0/2023-12-03-mace-128-L1_epoch-199.model",
        "residual blocks, 128x0e+128x1o, r_max 6 Å, 89 elements",
        _MP,
        aliases=("medium",),
        reported="01bfe22100139f424713cf921144e5509cbe353d67aa9fa1be9c6e1e0ed35845",
        size=44_422_970,
    ),
    # The README of ACEsuit/mace-foundations links another file as "large":
    # 2024-01-07-mace-128-L2_epoch-199.model. This is mace-torch's.
    _row(
        "mace-mp-0-large",
        f"{_MP_URL}/mace_mp_0/MACE_MPtrj_2022.9.model",
        "residual blocks, 128x0e+128x1o+128x2e, r_max 6 Å, 89 elements",
        _MP,
        aliases=("large",),
    ),
    _row(
        "mace-mp-0b-small",
        f"{_MP_URL}/mace_mp_0b/mace_agnesi_small.model",
        "residual blocks, Agnesi, ZBL, 128x0e, r_max 6 Å, 89 elements",
        _MP,
        aliases=("small-0b",),
        reported="7e3a0abcaf41e03a80e69f778e1b11b29de1cca704783dc25917a736392f8cf0",
    ),
    _row(
        "mace-mp-0b-medium",
        f"{_MP_URL}/mace_mp_0b/mace_agnesi_medium.model",
        "residual blocks, Agnesi, ZBL, 128x0e+128x1o, r_max 6 Å, 89 elements",
        _MP,
        aliases=("medium-0b",),
        reported="ab8baff639a8f295f3eccad3d3ccf574efb6fb63220bd52cd88664211569e521",
    ),
    _row(
        "mace-mp-0b2-small",
        f"{_MP_URL}/mace_mp_0b2/mace-small-density-agnesi-stress.model",
        "density blocks, Agnesi, ZBL, 128x0e, r_max 5 Å, 89 elements",
        _MP,
        aliases=("small-0b2",),
        reported="d5773bf9440e96d6eb8c598f84bd0e6369fcfa432f626a87f890e07da3c651c9",
    ),
    _row(
        "mace-mp-0b2-medium",
        f"{_MP_URL}/mace_mp_0b2/mace-medium-density-agnesi-stress.model",
        "density blocks, Agnesi, ZBL, 128x0e+128x1o, r_max 5 Å, 89 elements",
        _MP,
        aliases=("medium-0b2",),
        reported="a90be07c8aa6623c390fcc4653d3e319c4a356f8b4a53d323f96b2012d375caf",
    ),
    _row(
        "mace-mp-0b2-large",
        f"{_MP_URL}/mace_mp_0b2/mace-large-density-agnesi-stress.model",
        "density blocks, Agnesi, ZBL, 128x0e+128x1o+128x2e, r_max 5 Å, 89 elements",
        _MP,
        aliases=("large-0b2",),
        reported="348390e758e1c90011c7675e864850f8e9c5b3e7c217f79a2b4bad1baaa657ad",
    ),
    _row(
        "mace-mp-0b3-medium",
        f"{_MP_URL}/mace_mp_0b3/mace-mp-0b3-medium.model",
        "density blocks, Agnesi, ZBL, 128x0e+128x1o, r_max 6 Å, 89 elements",
        _MP,
        aliases=("medium-0b3",),
        reported="2f2be696351ac9e94fbe01cdfb6f017679acdbd2db7645209ef55fec9826b012",
    ),
    _row(
        "mace-mpa-0-medium",
        f"{_MP_URL}/mace_mpa_0/mace-mpa-0-medium.model",
        "density blocks, Agnesi, ZBL, 128x0e+128x1o, r_max 6 Å, 89 elements",
        _MP,
        aliases=("medium-mpa-0",),
        authors="75428afe3a1d7d8062e19bcaabd5c433623cabf308242ec9fb493e38604fb638",
        size=79_462_305,
    ),
    _row(
        "mace-omat-0-small",
        f"{_MP_URL}/mace_omat_0/mace-omat-0-small.model",
        "density blocks, Agnesi, ZBL, 128x0e, r_max 6 Å, 89 elements",
        _MP,
        aliases=("small-omat-0",),
        academic=True,
        reported="0abfde07862cf1e93b8b4d03cb702f29ce9c344ff2fc4de2ec0d7166d6c113a5",
    ),
    _row(
        "mace-omat-0-medium",
        f"{_MP_URL}/mace_omat_0/mace-omat-0-medium.model",
        "density blocks, Agnesi, ZBL, 128x0e+128x1o, r_max 6 Å, 89 elements",
        _MP,
        aliases=("medium-omat-0",),
        academic=True,
        reported="d4b14be9afa294eebdbe31a0280b26a0fa29715771e978cbfd3ca24e0d90307a",
    ),
    _row(
        "mace-matpes-pbe-0",
        f"{_FOUNDATIONS_URL}/mace_matpes_0/MACE-matpes-pbe-omat-ft.model",
        "OMAT-0 medium fine-tuned to PBE, 89 elements",
        _MP,
        academic=True,
        reported="e618ad582b84239905b9c3b77ce6e9ce111b0ecd1533223a1a6aac7a696b8aa0",
        size=79_471_284,
    ),
    _row(
        "mace-matpes-r2scan-0",
        f"{_FOUNDATIONS_URL}/mace_matpes_0/MACE-matpes-r2scan-omat-ft.model",
        "OMAT-0 medium fine-tuned to r2SCAN, 89 elements",
        _MP,
        academic=True,
        reported="8f147ecffa1d06a696e5648b13b81abda9c96fda9d0fb3faba3cd3fb27d9bba9",
        size=79_470_738,
    ),
    _row(
        "mace-mh-0",
        f"{_FOUNDATIONS_URL}/mace_mh_1/mace-mh-0.model",
        "seven heads, r_max 6 Å",
        _MH,
        academic=True,
        authors="d62ff8f293664e6556cfa49364b28ee72a70cf1e6150f3c111a578397fed609d",
    ),
    _row(
        "mace-mh-1",
        f"{_FOUNDATIONS_URL}/mace_mh_1/mace-mh-1.model",
        "non-linear blocks, six heads, 512x0e+512x1o, r_max 6 Å, 89 elements",
        _MH,
        academic=True,
        reported="a522eb7f59c7879963d41586528f4980baf33e086c94aa92e3eafdeccad3be47",
        size=59_208_139,
    ),
    _row(
        "mace-off23-small",
        f"{_OFF_URL}/mace_off23/MACE-OFF23_small.model",
        "organic molecules, 10 elements",
        _OFF,
        aliases=("small-off",),
        academic=True,
        authors="165cce4cfec5a34b9c64d4ebf95de15d71106bb584b7291c8470f0749977c46f",
    ),
    _row(
        "mace-off23-medium",
        f"{_OFF_URL}/mace_off23/MACE-OFF23_medium.model",
        "organic molecules, 128x0e+128x1o, r_max 5 Å, 10 elements",
        _OFF,
        aliases=("medium-off",),
        academic=True,
        reported="4842c52ad210d6e1f84d6cf1ffa70fae25a7e0d755ed55cf223f43913f587db7",
    ),
    _row(
        "mace-off23-large",
        f"{_OFF_URL}/mace_off23/MACE-OFF23_large.model",
        "organic molecules, 10 elements",
        _OFF,
        aliases=("large-off",),
        academic=True,
        reported="a29e397dbf3e7a24ac50a9b0dfc919bd5a62efa346f5895a6237b0950c1d76f4",
    ),
    _row(
        "mace-off23b-medium",
        f"{_OFF_URL}/mace_off23/MACE-OFF23b_medium.model",
        "organic molecules, 10 elements",
        _OFF,
        aliases=("mace-off23b",),
        academic=True,
    ),
    _row(
        "mace-off24-medium",
        f"{_OFF_URL}/mace_off24/MACE-OFF24_medium.model",
        "organic molecules, 10 elements",
        _OFF,
        aliases=("mace-off24",),
        academic=True,
    ),
    _row(
        "mace-omol-0-extra-large",
        f"{_FOUNDATIONS_URL}/mace_omol_0/MACE-omol-0-extra-large-1024.model",
        "non-linear blocks, three layers, charge and spin, r_max 6 Å, 83 elements",
        _OMOL,
        aliases=("mace-omol", "extra-large"),
        academic=True,
    ),
    _row(
        "mace-anicc",
        "https://github.com/ACEsuit/mace/raw/main/mace/calculators/foundations_models/ani500k_large_CC.model",
        "coupled cluster, organic molecules of H, C, N and O",
        _ANICC,
    ),
)

PUBLISHED: Mapping[str, Published] = MappingProxyType({entry.name: entry for entry in _ROWS})
"""All of them, by canonical name."""
