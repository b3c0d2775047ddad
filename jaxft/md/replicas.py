"""Replicas in one batch on the device, and the host that keeps their lists.

Room for pairs and edges is measured when a list is made; if it does not suffice, the step is not
taken, the room grows and the program is compiled anew. Nothing is ever dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ase
import jax
import numpy as np

from jaxft.data import Frame
from jaxft.data.neighbours import Edges
from jaxft.evaluate.predictions import cast
from jaxft.md import motion
from jaxft.md.ensembles import Ensemble, Knobs, knobs, nve
from jaxft.md.limits import HOST, Limits
from jaxft.md.pairs import Layout, Pairs, candidates_of, join, padded
from jaxft.md.placement import HEADROOM, place, roomy
from jaxft.potential import Potential
from jaxft.typing import Params

GROWTH = 1.25
"""Factor of a capacity that did not suffice."""


class Stop(NamedTuple):
    """Why a replica goes no further."""

    step: int
    """That could not be."""
    reason: str


class Snapshot(NamedTuple):
    """A replica with n atoms as it is, in float64."""

    positions: np.ndarray
    """[n, 3] Å, not wrapped."""
    velocities: np.ndarray
    """[n, 3] in ``ase.units``."""
    cell: np.ndarray
    """[3, 3] Å."""
    energy: float
    """eV, isolated-atom energies included."""
    stress: np.ndarray | None
    """[3, 3] eV/Å³; None unless periodic in three directions."""


class Replicas:
    """Structures that move together; each has a place in the arguments' order.

    Args:
      model: the potential.
      params: its parameters.
      structures: with the velocities to start from.
      frames: the same, without any that :func:`jaxft.data.prepare` refuses.
      head: of the model.
      dtype: of the computation.
      skin: Å beyond the cutoff that lists reach.
      limits: that end a replica.
      seeds: of each replica's noise.
    """

    def __init__(
        self,
        model: Potential,
        params: Params,
        structures: Sequence[ase.Atoms],
        frames: Sequence[Frame],
        *,
        head: str,
        dtype: str,
        skin: float,
        limits: Limits,
        seeds: Sequence[int],
    ) -> None:
        self.model, self.params, self.dtype = model, cast(params, dtype), dtype
        self.skin, self.limits, self.frames = skin, limits, list(frames)
        self.stops: dict[int, Stop] = {}
        self.rebuilds = 0
        """Lists made since the first."""
        self.shapes: list[tuple[Layout, int]] = []
        """Static shapes, each with a program of its own."""
        self.layout, self._still, self.state, self._starts, self._e0 = place(
            model,
            structures,
            frames,
            head=head,
            dtype=dtype,
            closest=limits.distance,
            seeds=seeds,
        )
        self._capacity, self._listed_at = 0, -1
        self._pairs = self._listed(0)

    @property
    def is_any_alive(self) -> bool:
        return len(self.stops) < len(self.frames)

    def evaluate(self) -> None:
        """Energies, forces and stresses where the atoms are at the very beginning."""
        if int(self.state.step) < 0:
            self.advance([nve()] * len(self.frames), 0.0, 0)

    def advance(self, ensembles: Sequence[Ensemble], timestep: float, target: int) -> None:
        """To the step ``target``, or until all replicas have ended.

        Args:
          ensembles: of each replica.
          timestep: fs.
          target: a step, counted from the very beginning.
        """
        moving = self._knobs(ensembles, timestep)
        while True:
            self.state = motion.advance(
                self.model,
                self.layout,
                np.asarray(self.skin, self.dtype),
                self.params,
                self._still,
                self._pairs,
                moving,
                self.state,
                np.int32(target),
            )
            state = self.state
            step, moved, lacking, reason, ended = jax.device_get(
                (state.step, state.moved, state.n_row, state.reason, state.ended)
            )
            for g in np.flatnonzero(~np.isin(reason[:-1], (0, HOST))):
                self.stops.setdefault(
                    int(g), Stop(int(ended[g]), self.limits.describe(int(reason[g])))
                )
            if lacking:
                self._widen(int(lacking))
            elif moved.any():
                # a list that the next step leaves again at once cannot be helped by another
                is_fresh = int(step) == self._listed_at
                self.renew(np.flatnonzero(moved[:-1]) if is_fresh else ())
            else:
                return

    def renew(self, too_fast: Sequence[int] | np.ndarray = ()) -> None:
        """New lists where the atoms are; ``too_fast`` replicas outran the one just made."""
        step = int(self.state.step)
        positions, cells = self._where()
        self.frames = [
            Frame(old.atomic_numbers, here, cell, old.pbc, source=old.source)
            for old, here, cell in zip(self.frames, positions, cells, strict=True)
        ]
        for g in too_fast:
            why = f"an atom would move more than {self.skin / 2:g} Å in one step"
            self._stop(int(g), step + 1, why)
        self.state = self.state._replace(
            displacements=np.zeros_like(self.state.displacements),
            strain=np.zeros_like(self.state.strain),
            moved=np.zeros_like(self.state.moved),
        )
        self._pairs = self._listed(step + 1)
        volumes = [frame.volume if frame.is_periodic else 1.0 for frame in self.frames]
        graph = self._still.graph._replace(volume=np.array([*volumes, 1.0], self.dtype))
        self._still = self._still._replace(graph=graph)
        self.rebuilds += 1
        self._listed_at = step

    def snapshots(self) -> dict[int, Snapshot]:
        """Of the replicas that live, by place."""
        positions, cells = self._where()
        state = self.state
        velocities, energies, stress = jax.device_get(
            (state.velocities, state.energies, state.stress)
        )
        found = {}
        for g, frame in enumerate(self.frames):
            if g in self.stops:
                continue
            atoms = slice(self._starts[g], self._starts[g] + len(frame))
            found[g] = Snapshot(
                positions[g],
                np.asarray(velocities[atoms], np.float64),
                cells[g],
                float(np.asarray(energies[atoms], np.float64).sum() + self._e0[g]),
                np.asarray(stress[g], np.float64) if frame.is_periodic else None,
            )
        return found

    def _knobs(self, ensembles: Sequence[Ensemble], timestep: float) -> Knobs:
        return knobs(
            ensembles,
            [len(frame) for frame in self.frames],
            timestep=timestep,
            hottest=self.limits.temperature,
            dtype=self.dtype,
        )

    def _stop(self, place: int, step: int, why: str) -> None:
        """The host's reasons; the device is told with the next call."""
        self.stops.setdefault(place, Stop(step, why))
        reason = np.array(self.state.reason)
        reason[place] = HOST
        self.state = self.state._replace(reason=reason)

    def _widen(self, lacking: int) -> None:
        n_row = roomy(lacking, GROWTH, self.layout.blocks)
        self.layout = self.layout._replace(n_row=n_row)
        self.state = self.state._replace(n_row=np.int32(0))
        self.shapes.append((self.layout, self._capacity))

    def _listed(self, step: int) -> Pairs:
        """Pairs of the replicas that live; those whose list cannot be made end before ``step``."""
        reach = self.model.r_max + self.skin
        found: list[Edges | None] = []
        for g, frame in enumerate(self.frames):
            found.append(None)
            if g not in self.stops:
                try:
                    found[g] = candidates_of(frame, reach)
                except ValueError as error:
                    self._stop(g, step, str(error).splitlines()[0])
        edges = join(found, self._starts.tolist())
        n_pair = len(edges.senders)
        if n_pair > self._capacity:
            self._capacity = roomy(n_pair, GROWTH if self._capacity else HEADROOM)
            self.shapes.append((self.layout, self._capacity))
        n_node = len(self._still.masses)
        return padded(edges, self._capacity, n_node=n_node, reach=reach, dtype=self.dtype)

    def _where(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Positions and cells of all replicas in float64, Å."""
        shift, strain = jax.device_get((self.state.displacements, self.state.strain))
        positions, cells = [], []
        for g, (start, frame) in enumerate(zip(self._starts, self.frames, strict=True)):
            scale = float(np.exp(np.float64(strain[g])))
            here = np.asarray(shift[start : start + len(frame)], np.float64)
            positions.append(scale * (frame.positions + here))
            cells.append(scale * frame.cell)
        return positions, cells
