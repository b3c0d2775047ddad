"""Print how far the two levels of theory lie apart: isolated atoms against chemistry.

The test frames are labelled again with GFN2-xTB, so both levels see the same geometries.
"""

import numpy as np
from frames import HERE, load
from make_base import calculator


def atomic_energies(name):
    """E0 by element symbol."""
    frames = load(HERE / f"{name}_atoms.xyz")
    return {str(f.symbols): float(f.info["REF_energy"]) for f in frames}


def compare(name):
    """Rows for one target set: total and atomisation energies per atom, forces."""
    base, target = atomic_energies("base"), atomic_energies(name)
    for symbol, energy in target.items():
        print(f"E0 {symbol:2s}: base {base[symbol]:10.3f}  target {energy:10.3f} eV", end="")
        print(f"  gap {energy - base[symbol]:10.3f}")
    rows, forces, failed = [], [], 0
    for frame in load(HERE / f"{name}_test.xyz"):
        other = frame.copy()
        other.calc = calculator()
        try:
            energy = other.get_potential_energy()
        except Exception:  # tblite has its own per version; a strained cell that does not converge
            failed += 1
            continue
        e0 = [sum(level[s] for s in frame.symbols) for level in (base, target)]
        labels = np.array([energy, frame.info["REF_energy"]])
        rows.append(np.concatenate([labels, labels - e0]) / len(frame))
        forces.append((other.get_forces() - frame.arrays["REF_forces"]).ravel())
    base_total, total, base_bound, bound = np.mean(rows, axis=0)
    offset = np.diff(np.array(rows)[:, 2:], axis=1)
    print(f"{name}, {len(rows)} test frames ({failed} did not converge), eV/atom")
    print(f"  total energy    base {base_total:9.3f} target {total:9.3f}", end="")
    print(f" gap {total - base_total:9.3f}")
    print(f"  cohesive energy base {-base_bound:9.3f} target {-bound:9.3f}", end="")
    print(f" gap {base_bound - bound:9.3f}, spread of the gap {offset.std():.3f}")
    print(f"  forces: RMS difference {np.sqrt(np.mean(np.concatenate(forces) ** 2)):.3f} eV/Å\n")


if __name__ == "__main__":
    for target_set in ("ethanol", "nacl"):
        compare(target_set)
