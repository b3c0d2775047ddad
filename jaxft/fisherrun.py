"""A Fisher from a config: pretraining frames in, a file for ``ewc`` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxft import bundle, data, fisherfile, inputs
from jaxft.calibration import calibration
from jaxft.config import Config
from jaxft.display import Display
from jaxft.fisher import fisher, sampled
from jaxft.objective import objective, outputs
from jaxft.strategies import Fisher


def estimate_fisher(
    config: Config,
    files: Sequence[Path],
    output: Path,
    *,
    n: int | None,
    probes: int | None,
    threshold: float | None,
    normalise: str | None,
    head: str | None,
    strength: float | None,
    seed: int,
    console: Console,
) -> Fisher:
    """Estimate the Fisher of a config's loss at its model on other data, and write it.

    Args:
      config: gives the model (with the head that it adds), the loss, the keys and the precision.
      files: of frames with pretraining labels.
      output: of the new file.
      n: frames to take, in an order drawn from ``seed``; None is all.
      probes: per frame, of a sampled Fisher; None is the empirical one.
      threshold, normalise: as in :func:`jaxft.fisher`.
      head: that the frames belong to.
      strength: λ that the printed report is for.
      seed: of the order and the probes.
      console: for the report.

    Raises:
      ValueError, FileExistsError: input that cannot be used.
    """
    bundle.refuse_existing(output)
    begin = inputs.computing(config, inputs.with_moments(config, inputs.start(config)))
    head = head or begin.like or config.head
    frames = data.without_isolated_atoms(data.read(files, keys=inputs.keys(config)))
    prepared = data.prepare(
        frames,
        begin.base,
        head=head,
        cache=config.cache,
        workers=config.workers,
        probes=config.loss.probes,
    )
    batches = data.epoch(prepared, 1, dtype=config.compute_dtype, seed=seed)
    facts = {
        "loss": config.loss.model_dump(),
        "files": [str(path) for path in files],
        "head": head,
        "dtype": config.dtype,
    }
    with Display(console).counter(label="fisher") as advance:
        shared: dict[str, Any] = {
            "n": n,
            "normalise": normalise,
            "provenance": facts,
            "progress": advance,
        }
        if probes is None:
            data.require_labels(frames, config.loss.labels, keys=inputs.keys(config))
            found = fisher(
                objective(config, begin.base), begin.params, batches, threshold=threshold, **shared
            )
        else:
            found = sampled(
                outputs(config, begin.base),
                begin.params,
                batches,
                probes=probes,
                seed=seed,
                **shared,
            )
    fisherfile.save(output, found)
    console.print(calibration(found, strength).render())
    console.print(f"wrote {output} ({found.provenance['frames']} frames)")
    return found
