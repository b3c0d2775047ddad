"""Energies, forces and stresses of frames: batched, padded, in one compilation.

Isolated-atom energies are added here, on the host and in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import ase.io
import jax
import jax.numpy as jnp
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from jaxft.bundle import refuse_existing, require_dtype
from jaxft.data import Dataset, Frame, Shape, pack, prepare, read_atoms, unlabelled
from jaxft.effort import effort
from jaxft.evaluate.batches import plan_batches
from jaxft.graph import Graph, edges_per_block, in_blocks
from jaxft.potential import E0_BUFFER, Potential, Prediction, predict
from jaxft.typing import Array, Params


@dataclass(frozen=True, eq=False)
class FrameResult:
    """What a model says of one frame."""

    energy: float
    """eV, total: isolated-atom energies included."""
    energies: np.ndarray
    """[n] eV, per atom, isolated-atom energies included; their sum is ``energy``."""
    forces: np.ndarray
    """[n, 3] eV/Å."""
    stress: np.ndarray | None
    """[3, 3] eV/Å³, ASE sign; None unless the frame is periodic in three directions."""
    moments: np.ndarray | None = None
    """[n] or [n, 3] µB; None of models without a moment head."""
    mean_moments: np.ndarray | None = None
    """[n] µB, what each element's mean would say, see :attr:`Potential.mean_moments`."""


GROWTH = 1.5
"""Of a room that became too small."""


@dataclass(eq=False)
class Room:
    """What batches of structures that move are padded to: it grows in steps and never shrinks.

    Neighbours come and go as structures move, and every other shape is another program; with a room
    a relaxation compiles few.
    """

    row_width: int | None = None
    shape: Shape | None = None

    def hold(self, dataset: Dataset, shape: Shape) -> Shape:
        """A shape that ``shape`` fits into."""
        self.row_width = dataset.row_width
        if self.shape is None:
            self.shape = shape
        pairs = zip(self.shape, shape, strict=True)
        sizes = (old if new <= old else int(np.ceil(GROWTH * new)) for old, new in pairs)
        self.shape = Shape(*sizes)
        return self.shape


class _Alike:
    """A potential as a key: those that differ in their isolated-atom energies alone, which are
    added on the host, share compiled programs."""

    def __init__(self, model: Potential) -> None:
        self.model = model
        arrays = tuple((k, id(v)) for k, v in sorted(model.buffers.items()) if k != E0_BUFFER)
        self._key = (id(model.config), model.backend, arrays)  # `model` keeps them alive

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and self._key == other._key


def _prediction(alike: _Alike, params: Params, graph: Graph) -> Prediction:
    return predict(alike.model, params, graph)


def _node_energies(alike: _Alike, params: Params, graph: Graph) -> Array:
    return alike.model.node_energies(params, graph)


# One jit for everything that predicts (and one for what is short, compiled quickly): predictions
# before and after training, of several files or by several calculators, share compiled programs.
_predict = jax.jit(_prediction, static_argnums=0)
_predict_energies = jax.jit(_node_energies, static_argnums=0)


@functools.cache
def _quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for calls that see few edges in all."""
    return jax.jit(function, static_argnums=0, compiler_options=dict(effort(0).options))


def predict_batch(
    model: Potential,
    params: Params,
    dataset: Dataset,
    chosen: Sequence[int],
    shape: Shape,
    *,
    num_elements: int | None = None,
    blocks: int = 1,
    edges: float = math.inf,
) -> list[FrameResult]:
    """Results of the frames at the positions ``chosen`` of ``dataset``, as one batch.

    Compiles once per shape, row width, numbers of elements and of blocks, and dtype.

    Args:
      model: the potential.
      params: its parameters as jax arrays; their dtype is that of the computation.
      dataset: from :func:`jaxft.data.prepare`.
      chosen: positions in it.
      shape: that the frames fit into.
      num_elements: pad the batch's elements to so many; by default they are not padded.
      blocks: evaluate it in so many parts, see :func:`jaxft.graph.in_blocks`.
      edges: in all calls with this program, for :func:`jaxft.effort.effort`; unknown by default.
    """
    dtype = jax.tree.leaves(params)[0].dtype.name
    graph = packed_graph(dataset, chosen, shape, dtype, num_elements=num_elements, blocks=blocks)
    program = _quickly(_prediction) if effort(edges, model.channels).options else _predict
    prediction = jax.device_get(program(_Alike(model), params, graph))
    return frame_results(model.e0s, dataset, chosen, prediction, model.mean_moments)


def packed_graph(
    dataset: Dataset,
    chosen: Sequence[int],
    shape: Shape,
    dtype: str,
    *,
    num_elements: int | None = None,
    blocks: int = 1,
) -> Graph:
    """The graph of one batch; arguments as in :func:`predict_batch`."""
    graph = pack(dataset, chosen, shape, dtype).graph
    if blocks > 1:
        graph = in_blocks(graph, blocks, r_max=dataset.r_max, n_row=shape.n_row)
    spare = max((num_elements or 0) - len(dataset.elements), 0)
    elements = np.pad(dataset.elements, (0, spare), mode="edge")
    return graph._replace(elements=jnp.asarray(elements))


def frame_results(
    e0s: np.ndarray,
    dataset: Dataset,
    chosen: Sequence[int],
    prediction: Prediction,
    means: np.ndarray | None = None,
) -> list[FrameResult]:
    """Results of the frames of a batch from its prediction (numpy) and isolated-atom energies
    [heads, elements], which are added here; ``means`` [elements] are of moments."""
    results = []
    places = _places(e0s, dataset, chosen)
    for g, (index, (atoms, own)) in enumerate(zip(chosen, places, strict=True)):
        frame = dataset.frames[index]
        energies = np.asarray(prediction.node_energy[atoms], np.float64) + own
        stress = np.array(prediction.stress[g], np.float64) if frame.is_periodic else None
        forces = np.array(prediction.forces[atoms], np.float64)
        moments, mean = None, None
        if prediction.moments is not None and means is not None:
            moments = np.array(prediction.moments[atoms], np.float64)
            mean = means[dataset.elements[dataset.samples[index].species]]
        energy = float(energies.sum())
        results.append(FrameResult(energy, energies, forces, stress, moments, mean))
    return results


def _places(
    e0s: np.ndarray, dataset: Dataset, chosen: Sequence[int]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Where each frame's atoms are in their batch, and their isolated-atom energies in eV."""
    start = 0
    for sample in (dataset.samples[index] for index in chosen):
        atoms = slice(start, start + len(sample.species))
        start = atoms.stop
        yield atoms, e0s[sample.head, dataset.elements[sample.species]]


def predict_energies(
    model: Potential,
    params: Params,
    frames: Sequence[Frame],
    *,
    head: str | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """[frames] eV, total energies alone, as :func:`predict_frames` finds them at a third of the
    cost."""
    _check_size(batch_size)
    dtype = working_dtype(params)
    params = cast(params, dtype)
    found = np.zeros(len(frames))
    if not frames:
        return found
    dataset = prepare(frames, model, head=head)
    shape, batches, blocks = plan_batches(dataset, batch_size, edges_per_block(None))
    few = effort(dataset.edges.sum(), model.channels).options
    program = _quickly(_node_energies) if few else _predict_energies
    for chosen in batches:
        graph = packed_graph(dataset, chosen, shape, dtype, blocks=blocks)
        energies = np.asarray(program(_Alike(model), params, graph), np.float64)
        places = _places(model.e0s, dataset, chosen)
        for index, (atoms, own) in zip(chosen, places, strict=True):
            found[index] = (energies[atoms] + own).sum()
    return found


def predict_frames(
    model: Potential,
    params: Params,
    frames: Sequence[Frame],
    *,
    head: str | None = None,
    batch_size: int = 16,
    dtype: str | None = None,
    max_edges_per_block: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    room: Room | None = None,
) -> list[FrameResult]:
    """Energies, forces and stresses of ``frames``, in their order.

    All batches have one static shape, which holds the ``batch_size`` largest frames; smaller ones
    fill it in greater numbers. So the model is compiled once, and the largest frames come first, so
    that memory runs out at once or never. Large batches are evaluated in blocks. Results depend on
    the sizes of batches and blocks by rounding only.

    Args:
      model: the potential.
      params: its parameters, jax or numpy.
      frames: structures; their labels are not looked at.
      head: of the model; not needed with one head.
      batch_size: largest frames per batch.
      dtype: of the computation; by default as :func:`working_dtype`.
      max_edges_per_block: batches with more edge slots are evaluated in blocks of so many, which
        bounds the memory; by default what suits the platform, see :mod:`jaxft.graph`.
      progress: called with (frames done, frames in total) after every batch.
      room: for calls with the same structures as they move, which then share programs.

    Raises:
      ValueError: the head is unknown, a frame holds an element that the model does not know or an
        impossible geometry (before anything is compiled), or float64 is asked for while JAX has it
        switched off.
    """
    _check_size(batch_size)
    params = cast(params, working_dtype(params, dtype))
    limit = edges_per_block(max_edges_per_block)
    if not frames:
        return []
    dataset = prepare(frames, model, head=head, row_width=room.row_width if room else None)
    results: dict[int, FrameResult] = {}
    shape, batches, blocks = plan_batches(dataset, batch_size, limit)
    if room is not None and blocks == 1:
        shape = room.hold(dataset, shape)
    # with room there are further calls, nobody knows how many
    edges = dataset.edges.sum() if room is None else math.inf
    for chosen in batches:
        found = predict_batch(model, params, dataset, chosen, shape, blocks=blocks, edges=edges)
        results.update(zip(chosen, found, strict=True))
        if progress is not None:
            progress(len(results), len(frames))
    return [results[i] for i in range(len(frames))]


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batches of {batch_size} frames are not possible; use batch_size >= 1.")


def predict_file(
    model: Potential,
    params: Params,
    structures: str | Path,
    output: str | Path,
    *,
    head: str | None = None,
    batch_size: int = 16,
    dtype: str | None = None,
    max_edges_per_block: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Predict all structures of a file and write them, with results, as extended XYZ.

    What the structures carry in ``info`` and ``arrays`` is kept, see :func:`with_results`.

    Args:
      model: the potential.
      params: its parameters.
      structures: a file that ASE reads.
      output: the file to write.
      head: as in :func:`predict_frames`, like the four that follow.
      batch_size: largest frames per batch.
      dtype: of the computation.
      max_edges_per_block: bounds the memory.
      progress: called after every batch.

    Returns:
      How many structures were written.

    Raises:
      FileExistsError: ``output`` exists; nothing is overwritten.
      ValueError: as :func:`predict_frames`, the file cannot be read, or a result is not finite.
    """
    output = Path(output)
    refuse_existing(output)
    if output.suffix not in (".xyz", ".extxyz") or not output.parent.is_dir():
        raise ValueError(
            f"{output} cannot be written; give NAME.xyz or NAME.extxyz in a folder that exists."
        )
    images = read_atoms(Path(structures))
    frames = [unlabelled(atoms, source=f"{structures}:{i}") for i, atoms in enumerate(images)]
    results = predict_frames(
        model,
        params,
        frames,
        head=head,
        batch_size=batch_size,
        dtype=dtype,
        max_edges_per_block=max_edges_per_block,
        progress=progress,
    )
    wrong = [f.source for f, r in zip(frames, results, strict=True) if not _is_finite(r)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(frames)} frames have energies or forces that are not finite, "
            f"the first is {wrong[0]}; nothing was written.\nLook for atoms on top of each other, "
            "or for NaN in the model (jaxft info)."
        )
    written = [with_results(a, r) for a, r in zip(images, results, strict=True)]
    scratch = output.with_name(f".{output.name}.part")
    try:
        ase.io.write(scratch, written, format="extxyz")
        scratch.rename(output)
    finally:
        scratch.unlink(missing_ok=True)
    return len(written)


def _is_finite(result: FrameResult) -> bool:
    moments = 0.0 if result.moments is None else result.moments
    return all(np.isfinite(x).all() for x in (result.energy, result.forces, moments))


def working_dtype(params: Params, dtype: str | None = None) -> str:
    """``dtype``, or by default float64 if ``params`` are and JAX has it switched on, else float32.

    Raises:
      ValueError: float64 is asked for while JAX has it switched off.
    """
    if dtype is not None:
        return require_dtype(dtype)
    is_double = np.result_type(*(leaf.dtype for leaf in jax.tree.leaves(params))) == np.float64
    return "float64" if is_double and jax.config.read("jax_enable_x64") else "float32"


def cast(params: Params, dtype: str) -> Params:
    """The parameters as jax arrays of ``dtype``."""

    def leaf(array: Array | np.ndarray) -> Array:
        return jnp.asarray(array, dtype)

    return jax.tree.map(leaf, params)


def with_results(atoms: ase.Atoms, result: FrameResult) -> ase.Atoms:
    """A copy of ``atoms`` that answers ``get_potential_energy`` and its kin with ``result``.

    Its ``info`` and ``arrays`` are kept, so labels under ``REF_*`` keys stay beside the results
    when the copy is written. Results of a calculator on ``atoms`` are replaced; read labels that a
    file stores as plain ``energy`` and ``forces`` before.

    Raises:
      ValueError: ``result`` belongs to a structure with another number of atoms.
    """
    if len(result.forces) != len(atoms):
        raise ValueError(
            f"the result has {len(result.forces)} atoms, the structure {atoms.symbols} has "
            f"{len(atoms)}; give the structure that the result was predicted for."
        )
    copy = atoms.copy()
    copy.calc = SinglePointCalculator(copy, **ase_results(result))
    return copy


def ase_results(result: FrameResult) -> dict[str, float | np.ndarray]:
    """In ASE's words: stress in Voigt order xx, yy, zz, yz, xz, xy, absent where it is None;
    ``magmoms`` in µB and their sum ``magmom``, of models with a moment head."""
    found: dict[str, float | np.ndarray] = {
        "energy": result.energy,
        "free_energy": result.energy,
        "energies": result.energies,
        "forces": result.forces,
    }
    if result.stress is not None:
        found["stress"] = full_3x3_to_voigt_6_stress(result.stress)
    if result.moments is not None:
        total = result.moments.sum(axis=0)
        found["magmoms"] = result.moments
        found["magmom"] = total if result.moments.ndim > 1 else float(total)
    return found
