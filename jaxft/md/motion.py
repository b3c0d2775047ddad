"""Steps on the device: all replicas at once, until something is for the host to do."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.graph import Graph, sum_atoms
from jaxft.md.ensembles import Knobs
from jaxft.md.limits import NOT_FINITE, TOO_CLOSE, TOO_HOT
from jaxft.md.pairs import Layout, Located, Pairs, edge_rows, locate
from jaxft.potential import Potential, predict
from jaxft.typing import Array, Params

OF_VOLUME = 0xFFFFFFFF
"""Folded into a replica's key of the step where atoms fold their rank."""


class Still(NamedTuple):
    """What does not move."""

    graph: Graph
    """Without edges; volumes are those where the list was made."""
    masses: Array
    """[N] amu."""
    radii: Array
    """[N] Å; two atoms closer than the sum end their replica."""
    keys: Array
    """[G] random keys, one per replica."""
    rank: Array
    """[N] int32, position of an atom in its replica."""


class State(NamedTuple):
    """What the next step needs; the last graph is that of the padding."""

    step: Array
    """[] int32, steps that are done."""
    displacements: Array
    """[N, 3] Å, since the list was made, before scaling."""
    velocities: Array
    """[N, 3] in ``ase.units``."""
    strain: Array
    """[G], logarithm of the scale since the list was made."""
    forces: Array
    """[N, 3] eV/Å."""
    energies: Array
    """[N] eV, interaction energies."""
    stress: Array
    """[G, 3, 3] eV/Å³."""
    reason: Array
    """[G] int32, why it ended; 0 while it is alive."""
    ended: Array
    """[G] int32, the step that could not be."""
    moved: Array
    """[G] bool, the next step leads out of the list."""
    n_row: Array
    """[] int32, rows that the next step needs and the layout lacks; 0 is none."""

    @property
    def is_alive(self) -> Array:
        """[G]; a replica that ended stays where it last was sound."""
        return self.reason == 0


def kinetic_energy(velocities: Array, still: Still) -> Array:
    """[G] eV."""
    return sum_atoms(0.5 * still.masses * (velocities * velocities).sum(1), still.graph)


@functools.partial(jax.jit, static_argnums=(0, 1))
def advance(
    model: Potential,
    layout: Layout,
    skin: Array,
    params: Params,
    still: Still,
    pairs: Pairs,
    knobs: Knobs,
    state: State,
    until: Array,
) -> State:
    """Go on until the step ``until``, or until a list, more room or the end of all is needed.

    A step that cannot be taken changes nothing but ``moved`` or ``n_row``.
    """

    def is_going(state: State) -> Array:
        waits = state.moved.any() | (state.n_row > 0)
        return (state.step < until) & ~waits & state.is_alive.any()

    def body(state: State) -> State:
        trial = _drifted(still, knobs, state)
        # a pair outside the list is further apart than the cutoff as long as no atom moves by this
        room = 0.5 * (model.r_max + skin - model.r_max * jnp.exp(-trial.strain))
        square = (trial.displacements**2).sum(1)
        outside = square > jnp.square(jnp.maximum(room, 0.0))[still.graph.graph_index]
        outside = outside & still.graph.is_atom
        moved = (sum_atoms(outside.astype(jnp.int32), still.graph) > 0) & state.is_alive
        finish = functools.partial(_kicked, model, layout, params, still, pairs, knobs)
        return jax.lax.cond(
            moved.any(), lambda *_: state._replace(moved=moved), finish, state, trial
        )

    return jax.lax.while_loop(is_going, body, state)


def _drifted(still: Still, knobs: Knobs, state: State) -> State:
    """B A O A of a step, with the barostat beside the thermostat."""
    graph, dt = still.graph, knobs.timestep
    of = graph.graph_index
    velocities = state.velocities + 0.5 * dt * state.forces / still.masses[:, None]
    scale = jnp.exp(state.strain)
    displacements = state.displacements + 0.5 * dt * velocities / scale[of, None]
    keys = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(still.keys)
    velocities = _thermostat(still, knobs, keys, velocities)
    growth = _barostat(still, knobs, keys, state)
    velocities = velocities * jnp.exp(-growth)[of, None]
    strain = state.strain + growth
    displacements = displacements + 0.5 * dt * velocities / jnp.exp(strain)[of, None]
    return state._replace(displacements=displacements, velocities=velocities, strain=strain)


def _thermostat(still: Still, knobs: Knobs, keys: Array, velocities: Array) -> Array:
    of, dtype = still.graph.graph_index, velocities.dtype

    def noise(key: Array, rank: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, rank), (3,), dtype)

    # Langevin: exact for the Ornstein-Uhlenbeck process
    kept = jnp.exp(-knobs.friction * knobs.timestep)
    width = jnp.sqrt((1 - kept**2) * knobs.temperature)
    random = jax.vmap(noise)(keys[of], still.rank)
    width = width[of, None] / jnp.sqrt(still.masses)[:, None]
    velocities = kept[of, None] * velocities + width * random

    # Bussi: exact for the kinetic energy, eq. A7. R1 is the noise along the velocities, and the sum
    # of all squares is that of the noise without the centre of mass, both in mass-weighted axes.
    kept = jnp.exp(-knobs.rescaling * knobs.timestep)
    root = jnp.sqrt(still.masses)[:, None]
    weight = sum_atoms(root**2, still.graph)
    centre = sum_atoms(root * random, still.graph) / jnp.sqrt(weight)
    is_held = knobs.degrees < 3 * sum_atoms(jnp.ones_like(still.masses), still.graph)
    squares = sum_atoms((random**2).sum(1), still.graph) - is_held * (centre**2).sum(1)
    found = jnp.maximum(kinetic_energy(velocities, still), jnp.finfo(dtype).tiny ** 0.5)
    along = sum_atoms((root * velocities * random).sum(1), still.graph) / jnp.sqrt(2 * found)
    share = 0.5 * knobs.temperature / found
    square = kept + (1 - kept) * share * squares + 2 * jnp.sqrt(kept * (1 - kept) * share) * along
    return velocities * jnp.sqrt(jnp.maximum(square, 0.0))[of, None]


def _barostat(still: Still, knobs: Knobs, keys: Array, state: State) -> Array:
    """[G], the step's growth of the logarithm of the length; Bernetti and Bussi, eq. 7."""
    volume = still.graph.volume * jnp.exp(3 * state.strain)
    kinetic = kinetic_energy(state.velocities, still)
    found = 2 * kinetic / (3 * volume) - jnp.trace(state.stress, axis1=1, axis2=2) / 3
    rate = knobs.squeezing * knobs.timestep
    draw = jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, OF_VOLUME), (), volume.dtype)
    )
    noise = jnp.sqrt(2 * knobs.temperature * rate / volume) * draw(keys)
    return (rate * (found - knobs.pressure) + noise) / 3


def _kicked(
    model: Potential,
    layout: Layout,
    params: Params,
    still: Still,
    pairs: Pairs,
    knobs: Knobs,
    state: State,
    trial: State,
) -> State:
    """The last B, with the forces where atoms are now; replicas that are not sound stay behind."""
    scale = jnp.exp(trial.strain)
    located = locate(pairs, trial.displacements, scale[still.graph.graph_index])
    graph = still.graph._replace(volume=still.graph.volume * scale**3)
    graph, n_row = edge_rows(pairs, located, layout, graph, model.r_max)
    found = predict(model, params, graph)
    kick = 0.5 * knobs.timestep * found.forces / still.masses[:, None]
    step = state.step + 1
    new = trial._replace(
        step=step,
        velocities=trial.velocities + kick,
        forces=found.forces,
        energies=found.node_energy,
        stress=found.stress,
    )
    reason = jnp.where(state.is_alive, _unsound(new, still, pairs, located, knobs), state.reason)
    ended = jnp.where(state.is_alive & (reason > 0), step, state.ended)
    new = _where_sound(reason == 0, still.graph.graph_index, new, state)
    new = new._replace(reason=reason, ended=ended)
    lacking = state._replace(n_row=n_row)
    return jax.tree.map(lambda a, b: jnp.where(n_row > layout.n_row, a, b), lacking, new)


def _unsound(new: State, still: Still, pairs: Pairs, located: Located, knobs: Knobs) -> Array:
    """[G] int32, what is wrong; 0 is nothing."""
    graph = still.graph
    kinetic = kinetic_energy(new.velocities, still)
    every = sum_atoms(new.energies + new.forces.sum(1), graph) + kinetic
    is_hot = 2 * kinetic > jnp.maximum(knobs.degrees, 1) * knobs.hottest
    least = still.radii[pairs.receivers] + still.radii[pairs.senders]
    near = jnp.zeros(graph.n_graph, jnp.int32)
    near = near.at[graph.graph_index[pairs.receivers]].add(
        located.squares < least**2, indices_are_sorted=True
    )
    reason = jnp.where(near > 0, TOO_CLOSE, jnp.where(is_hot, TOO_HOT, 0))
    return jnp.where(jnp.isfinite(every), reason, NOT_FINITE)


def _where_sound(is_sound: Array, of: Array, new: State, old: State) -> State:
    """What atoms and replicas have, of ``new`` where it is sound."""

    def choose(name: str, where: Array) -> Array:
        a, b = getattr(new, name), getattr(old, name)
        return jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    atoms = ("displacements", "velocities", "forces", "energies")
    graphs = ("strain", "stress")
    kept = {name: choose(name, is_sound[of]) for name in atoms}
    return new._replace(**kept, **{name: choose(name, is_sound) for name in graphs})
