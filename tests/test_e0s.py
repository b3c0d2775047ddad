"""Model-aware isolated-atom energies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxft import surgery
from jaxft.data import Frame
from jaxft.e0s import estimate, explain
from jaxft.potential import Potential


def moved(frames: list[Frame], shift: dict[int, float]) -> list[Frame]:
    """The frames at a level of theory whose atoms are ``shift`` eV away."""
    return [
        replace(f, energy=f.energy + sum(shift.get(int(z), 0.0) for z in f.atomic_numbers))
        for f in frames
    ]


def test_a_shift_of_the_atoms_is_found_exactly(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    shift = {1: -2.5, 6: 1000.0, 8: -30.0, 11: 4.0, 17: -7.0}
    before, after = (estimate(model, params, f) for f in (frames, moved(frames, shift)))
    assert before.rank == 4  # NaCl always holds as much Na as Cl
    for z in (1, 6, 8):
        assert after.e0s[z] - before.e0s[z] == pytest.approx(shift[z], abs=1e-8)
    pair = sum(after.e0s[z] - before.e0s[z] for z in (11, 17))
    assert pair == pytest.approx(shift[11] + shift[17], abs=1e-8)
    assert after.residual == pytest.approx(before.residual, abs=1e-8)
    assert "rank 4 of 5" in explain(after)
    assert "only sums are determined" in explain(after)


def test_one_molecule_gets_the_smallest_change(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    water = [frames[0]]
    found = estimate(surgery.set_e0s(model, {1: 0.0, 8: 0.0}), params, water)
    # Minimum norm: the change is proportional to the composition, H2O.
    assert found.rank == 1
    assert found.e0s[1] == pytest.approx(2 * found.e0s[8], rel=1e-9)
    assert found.residual < 1e-9


def test_frames_without_energy_say_nothing(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    silent = replace(frames[1], energy=None)
    both, one = (estimate(model, params, f) for f in ([frames[0], silent], [frames[0]]))
    assert both.e0s == one.e0s
    with pytest.raises(ValueError, match="no frame has an energy"):
        estimate(model, params, [silent])
