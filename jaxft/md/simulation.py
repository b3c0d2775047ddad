"""Molecular dynamics of many replicas at once, as trajectories.

A replica that leaves physics ends with a reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ase
import numpy as np

from jaxft.data import Frame, prepare, unlabelled
from jaxft.evaluate.predictions import working_dtype
from jaxft.md.ensembles import Ensemble
from jaxft.md.limits import Limits
from jaxft.md.pairs import candidates_of
from jaxft.md.replicas import Replicas
from jaxft.md.trajectory import Ended, Recorder, Trajectory
from jaxft.potential import Potential
from jaxft.typing import Params


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
        if not structures or len(seeds) != len(structures) or not 0 < skin < np.inf:
            raise ValueError(
                f"{len(structures)} structures, {len(seeds)} seeds and a skin of {skin} Å are not "
                "possible; give at least one structure, a seed for each, and a positive skin."
            )
        head = model.heads[model.head_index(head)]
        self.structures = [atoms.copy() for atoms in structures]
        self.ended: list[Ended | None] = [None] * len(structures)
        self.step = 0
        self.time = 0.0
        """ps."""
        sound: dict[int, Frame] = {}
        for i, atoms in enumerate(self.structures):
            try:
                frame = unlabelled(atoms, source=str(atoms.symbols))
                prepare([frame], model, head=head)
                candidates_of(frame, model.r_max + skin)
                sound[i] = frame
            except ValueError as error:
                self.ended[i] = Ended(0.0, str(error).splitlines()[0])
        self._who = list(sound)
        self._replicas: Replicas | None = None
        if sound:
            self._replicas = Replicas(
                model,
                params,
                [self.structures[i] for i in sound],
                list(sound.values()),
                head=head,
                dtype=working_dtype(params, dtype),
                skin=float(skin),
                limits=limits or Limits(),
                seeds=[seeds[i] for i in sound],
            )

    @property
    def rebuilds(self) -> int:
        """Lists made since the first."""
        return 0 if self._replicas is None else self._replicas.rebuilds

    @property
    def compilations(self) -> int:
        """Static shapes used so far; the program is compiled once for each."""
        return 0 if self._replicas is None else len(self._replicas.shapes)

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
        _check_run(timestep, steps, interval)
        chosen = self._one_each(ensembles)
        recorders = [
            Recorder(atoms, ensemble.degrees_of_freedom(len(atoms)))
            for atoms, ensemble in zip(self.structures, chosen, strict=True)
        ]
        done, unit = [0] * len(chosen), timestep / 1000
        if self._replicas is not None:
            moving = [chosen[i] for i in self._who]
            self._replicas.evaluate()
            self._record(self._replicas, recorders, 0.0)
            for target in [*range(interval, steps, interval), steps]:
                if not self._replicas.is_any_alive:
                    break
                self._replicas.advance(moving, timestep, self.step + target)
                if target % interval == 0:
                    self._record(self._replicas, recorders, target * unit)
                if progress is not None:
                    progress(target, steps)
            done = self._settle(self._replicas, steps, unit)
        self.step, self.time = self.step + steps, self.time + steps * unit
        return [
            recorder.trajectory(ended, n)
            for recorder, ended, n in zip(recorders, self.ended, done, strict=True)
        ]

    def _one_each(self, ensembles: Ensemble | Sequence[Ensemble]) -> list[Ensemble]:
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

    def _record(self, replicas: Replicas, recorders: Sequence[Recorder], since: float) -> None:
        """A frame of every replica that lives, ``since`` (ps) after the beginning of the run."""
        for g, now in replicas.snapshots().items():
            recorders[self._who[g]].add(self.time + since, *now)

    def _settle(self, replicas: Replicas, steps: int, unit: float) -> list[int]:
        """Steps that each did in this run, and when those that stopped in it did."""
        done = [0] * len(self.structures)
        for g, i in enumerate(self._who):
            stop = replicas.stops.get(g)
            if stop is None:
                done[i] = steps
            elif self.ended[i] is None:
                since = max(stop.step - self.step, 0)
                self.ended[i] = Ended(self.time + since * unit, stop.reason)
                done[i] = max(since - 1, 0)
        return done


def _check_run(timestep: float, steps: int, interval: int) -> None:
    if not 0 < timestep < np.inf or steps < 1 or interval < 1:
        raise ValueError(
            f"{steps} steps of {timestep} fs with a frame every {interval} are not possible; "
            "use positive numbers."
        )
