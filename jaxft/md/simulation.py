"""Many replicas in one batch on the device, and the host that keeps their lists.

A replica that leaves physics ends with a reason, and the others go on. Room for pairs and edges is
measured when a list is made; if it does not suffice, the step is not taken, the room grows and the
program is compiled anew. Nothing is ever dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ase
import jax
import numpy as np

from jaxft.data import Frame, prepare, unlabelled
from jaxft.data.neighbours import Edges
from jaxft.evaluate.predictions import cast, working_dtype
from jaxft.md import motion
from jaxft.md.ensembles import Ensemble, Knobs, knobs, nve
from jaxft.md.limits import HOST, Limits
from jaxft.md.pairs import Layout, Pairs, candidates_of, join, padded
from jaxft.md.placement import HEADROOM, place, roomy
from jaxft.md.trajectory import Ended, Recorder, Trajectory
from jaxft.potential import Potential
from jaxft.typing import Params

GROWTH = 1.25
"""Factor of a capacity that did not suffice."""


class Simulation:
    """Replicas that move; :meth:`run` goes on from where they are.

    Args:
      model: the potential.
      params: its parameters.
      structures: one per replica, with the velocities to start from; without, they are at rest.
      head: of the model; not needed with one head.
      dtype: of the computation, as in :func:`jaxft.evaluate.predict_frames`.
      skin: Å beyond the cutoff that lists reach.
      limits: that end a replica.
      seeds: of each replica's noise; by default its position. What a replica does depends on its
        own seed alone (and on rounding), not on those beside it.

    Raises:
      ValueError: there is no structure, an unknown head, a skin that is not positive, or not as
        many seeds as structures.
    """

    def __init__(
        self,
        model: Potential,
        params: Params,
        structures: Sequence[ase.Atoms],
        *,
        head: str | None = None,
        dtype: str | None = None,
        skin: float = 1.0,
        limits: Limits | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        seeds = range(len(structures)) if seeds is None else seeds
        if not structures or len(seeds) != len(structures) or not skin > 0:
            raise ValueError(
                f"{len(structures)} structures, {len(seeds)} seeds and a skin of {skin} Å are not "
                "possible; give at least one structure, a seed for each, and a positive skin."
            )
        self.model, self.dtype, self.skin = model, working_dtype(params, dtype), float(skin)
        self.params = cast(params, self.dtype)
        self.head = model.heads[model.head_index(head)]
        self.limits = limits or Limits()
        self.structures = [atoms.copy() for atoms in structures]
        self.ended: list[Ended | None] = [None] * len(structures)
        self.rebuilds = 0
        """Lists made since the first."""
        self.step = 0
        self.time = 0.0
        """ps."""
        self._shapes: list[tuple[Layout, int]] = []
        frames = [self._sound(i) for i in range(len(structures))]
        self._who = [i for i, frame in enumerate(frames) if frame is not None]
        self._frames = [frame for frame in frames if frame is not None]
        if self._frames:
            placed = place(
                model,
                [self.structures[i] for i in self._who],
                self._frames,
                head=self.head,
                dtype=self.dtype,
                closest=self.limits.distance,
                seeds=[seeds[i] for i in self._who],
            )
            self._layout, self._still, self._state, self._starts, self._e0 = placed
            self._capacity, self._listed_at = 0, -1
            self._pairs = self._listed()

    @property
    def compilations(self) -> int:
        """Static shapes used so far; the program is compiled once for each."""
        return len(self._shapes)

    def _sound(self, index: int) -> Frame | None:
        """The structure of a replica, or none, and it has ended."""
        atoms = self.structures[index]
        try:
            frame = unlabelled(atoms, source=str(atoms.symbols))
            prepare([frame], self.model, head=self.head)
            candidates_of(frame, self.model.r_max + self.skin)
        except ValueError as error:
            self.ended[index] = Ended(0.0, str(error).splitlines()[0])
            return None
        return frame

    def run(
        self,
        ensembles: Ensemble | Sequence[Ensemble],
        *,
        timestep: float,
        steps: int,
        interval: int = 10,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Trajectory]:
        """Move all replicas by ``steps`` steps, fewer where they end.

        Args:
          ensembles: one for all, or one for each replica.
          timestep: fs.
          steps: of this run.
          interval: steps between frames, which are kept in memory; between them nothing leaves the
            device.
          progress: called with (steps done, steps).

        Returns:
          A trajectory per structure. It begins with where the replica was, at the time of the
          runs before; one that had ended has no frames.

        Raises:
          ValueError: a time step that is not positive, no step or interval, ensembles for other
            replicas, or constant pressure for a structure that is not periodic in three directions.
        """
        chosen = self._checked(ensembles, timestep, steps, interval)
        recorders = [
            Recorder(atoms, ensemble.degrees_of_freedom(len(atoms)))
            for atoms, ensemble in zip(self.structures, chosen, strict=True)
        ]
        begin, self._began = self.step, self.time
        self._unit = timestep / 1000
        if self._frames:
            if int(self._state.step) < 0:
                self._go_on(self._knobs([nve()] * len(chosen), 0.0), 0)
            moving = self._knobs(chosen, timestep)
            self._record(recorders, begin)
            for target in [*range(begin + interval, begin + steps, interval), begin + steps]:
                self._go_on(moving, target)
                if not np.any(np.asarray(self._state.is_alive)):
                    break
                if (target - begin) % interval == 0:
                    self._record(recorders, begin)
                if progress is not None:
                    progress(target - begin, steps)
        self.step, self.time = begin + steps, self._began + steps * self._unit
        return [
            recorder.trajectory(ended, self._steps_done(i, begin))
            for i, (recorder, ended) in enumerate(zip(recorders, self.ended, strict=True))
        ]

    def _steps_done(self, index: int, begin: int) -> int:
        ended = self.ended[index]
        if ended is None:
            return self.step - begin
        return max(round((ended.time - self._began) / self._unit) - 1, 0)

    def _checked(
        self, ensembles: Ensemble | Sequence[Ensemble], timestep: float, steps: int, interval: int
    ) -> list[Ensemble]:
        if not 0 < timestep < np.inf or steps < 1 or interval < 1:
            raise ValueError(
                f"{steps} steps of {timestep} fs with a frame every {interval} are not possible; "
                "use positive numbers."
            )
        n = len(self.structures)
        chosen = [ensembles] * n if isinstance(ensembles, Ensemble) else list(ensembles)
        if len(chosen) != n:
            raise ValueError(f"{len(chosen)} ensembles for {n} replicas; give one, or one each.")
        for atoms, ensemble in zip(self.structures, chosen, strict=True):
            if ensemble.name == "npt" and not atoms.pbc.all():
                raise ValueError(
                    f"{atoms.symbols} has pbc={atoms.pbc.tolist()}; constant pressure needs a "
                    "structure that is periodic in three directions."
                )
        return chosen

    def _knobs(self, ensembles: Sequence[Ensemble], timestep: float) -> Knobs:
        return knobs(
            [ensembles[i] for i in self._who],
            [len(frame) for frame in self._frames],
            timestep=timestep,
            hottest=self.limits.temperature,
            dtype=self.dtype,
        )

    def _go_on(self, moving: Knobs, target: int) -> None:
        """To the step ``target``, or until all replicas have ended."""
        while True:
            self._state = motion.advance(
                self.model,
                self._layout,
                np.asarray(self.skin, self.dtype),
                self.params,
                self._still,
                self._pairs,
                moving,
                self._state,
                np.int32(target),
            )
            step, moved, lacking, reason, ended = jax.device_get(
                (
                    self._state.step,
                    self._state.moved,
                    self._state.n_row,
                    self._state.reason,
                    self._state.ended,
                )
            )
            self._note(reason, ended)
            if lacking:
                n_row = roomy(int(lacking), GROWTH, self._layout.blocks)
                self._layout = self._layout._replace(n_row=n_row)
                self._state = self._state._replace(n_row=np.int32(0))
                self._keep_shape()
            elif moved.any():
                is_fresh = int(step) == self._listed_at
                self._renew(moved if is_fresh else np.zeros_like(moved), int(step))
            else:
                return

    def _note(self, reason: np.ndarray, ended: np.ndarray) -> None:
        for g, i in enumerate(self._who):
            if self.ended[i] is None and reason[g] not in (0, HOST):
                time = self._began + max(int(ended[g]) - self.step, 0) * self._unit
                self.ended[i] = Ended(time, self.limits.describe(int(reason[g])))

    def _renew(self, too_fast: np.ndarray, step: int) -> None:
        """New lists where the atoms are; ``too_fast`` replicas outran the one just made."""
        positions, cells = self._where()
        reason = np.array(self._state.reason)
        time = self._began + (step + 1 - self.step) * self._unit
        for g, i in enumerate(self._who):
            old = self._frames[g]
            self._frames[g] = Frame(
                old.atomic_numbers, positions[g], cells[g], old.pbc, source=old.source
            )
            if too_fast[g]:
                why = f"an atom would move more than {self.skin / 2:g} Å in one step"
                self.ended[i], reason[g] = Ended(time, why), HOST
        self._state = self._state._replace(
            displacements=np.zeros_like(self._state.displacements),
            strain=np.zeros_like(self._state.strain),
            moved=np.zeros_like(self._state.moved),
            reason=reason,
        )
        self._pairs = self._listed(time)
        volumes = [f.volume if f.is_periodic else 1.0 for f in self._frames]
        graph = self._still.graph._replace(volume=np.array([*volumes, 1.0], self.dtype))
        self._still = self._still._replace(graph=graph)
        self.rebuilds += 1
        self._listed_at = step

    def _listed(self, time: float = 0.0) -> Pairs:
        """Pairs of the replicas that live; those whose list cannot be made end."""
        reach = self.model.r_max + self.skin
        reason = np.array(self._state.reason)
        found: list[Edges | None] = []
        for g, i in enumerate(self._who):
            found.append(None)
            if reason[g] == 0:
                try:
                    found[g] = candidates_of(self._frames[g], reach)
                except ValueError as error:
                    why = str(error).splitlines()[0]
                    self.ended[i], reason[g] = Ended(time, why), HOST
        self._state = self._state._replace(reason=reason)
        edges = join(found, self._starts.tolist())
        n_pair = len(edges.senders)
        if n_pair > self._capacity:
            self._capacity = roomy(n_pair, GROWTH if self._capacity else HEADROOM)
            self._keep_shape()
        n_node = len(self._still.masses)
        return padded(edges, self._capacity, n_node=n_node, reach=reach, dtype=self.dtype)

    def _keep_shape(self) -> None:
        self._shapes.append((self._layout, self._capacity))

    def _where(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Positions and cells of the replicas in float64, Å."""
        shift, strain = jax.device_get((self._state.displacements, self._state.strain))
        positions, cells = [], []
        for g, (start, frame) in enumerate(zip(self._starts, self._frames, strict=True)):
            scale = float(np.exp(np.float64(strain[g])))
            here = np.asarray(shift[start : start + len(frame)], np.float64)
            positions.append(scale * (frame.positions + here))
            cells.append(scale * frame.cell)
        return positions, cells

    def _record(self, recorders: Sequence[Recorder], begin: int) -> None:
        """A frame of every replica that lives."""
        positions, cells = self._where()
        step, velocities, energies, stress, reason = jax.device_get(
            (
                self._state.step,
                self._state.velocities,
                self._state.energies,
                self._state.stress,
                self._state.reason,
            )
        )
        time = self._began + (int(step) - begin) * self._unit
        for g, i in enumerate(self._who):
            if reason[g]:
                continue
            atoms = slice(self._starts[g], self._starts[g] + len(self._frames[g]))
            recorders[i].add(
                time,
                positions[g],
                np.asarray(velocities[atoms], np.float64),
                cells[g],
                float(np.asarray(energies[atoms], np.float64).sum() + self._e0[g]),
                np.asarray(stress[g], np.float64) if self._frames[g].is_periodic else None,
            )
