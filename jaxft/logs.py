"""Where the numbers of a run go: JSON lines, CSV, TensorBoard, Weights & Biases.

Every logger is started with the history of the run so far, empty for a new one, and writes that
history anew: a run that was killed between a log and a checkpoint repeats its last epoch, and no
epoch may stand in a log twice.
"""

from __future__ import annotations

import csv
import io
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import numpy as np

Value = float | int | bool
Row = Mapping[str, Value]

STEP = "epoch"
"""The entry of a row that counts."""

SUFFIX = ".jaxft"
"""Of the TensorBoard files that are ours to replace."""


class Logger(Protocol):
    """What a run needs of a log."""

    def start(self, history: Sequence[Row]) -> None:
        """Open the log and leave exactly the rows of ``history`` in it. Call it first."""

    def log(self, row: Row) -> None:
        """Add a row; whoever reads the log next sees it whole."""

    def close(self) -> None:
        """Release what is held. Closing twice, or what never started, does nothing."""


class Logs:
    """Several loggers as one.

    Args:
      loggers: started in this order. If one fails to start, those before it are closed and its
        error is raised, so nothing is trained without the logs that were asked for.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)

    def start(self, history: Sequence[Row] = ()) -> None:
        for i, logger in enumerate(self.loggers):
            try:
                logger.start(history)
            except BaseException:
                for started in self.loggers[:i]:
                    started.close()
                raise

    def log(self, row: Row) -> None:
        for logger in self.loggers:
            logger.log(row)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class JsonLines:
    """One JSON object per line, ``{"epoch": 0, "valid/energy": 0.0123, …}``.

    JSON has no NaN and no infinity: both become ``null``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def start(self, history: Sequence[Row]) -> None:
        _replace(self.path, "".join(map(_json_line, history)))
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        _append(self._file, _json_line(row), self)

    def close(self) -> None:
        _close(self._file)


class Csv:
    """A table with a column per name, in order of first appearance; absent values are empty.

    A name that appears later adds a column to all rows: the file is then replaced whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None
        self._rows: list[Row] = []

    def start(self, history: Sequence[Row]) -> None:
        self._rows = list(history)
        self._rewrite()

    def log(self, row: Row) -> None:
        is_new = not set(row) <= set(self._columns())
        self._rows.append(row)
        if is_new and self._file is not None:
            self._rewrite()
        else:
            _append(self._file, _csv_lines([row], self._columns()), self)

    def close(self) -> None:
        _close(self._file)

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def _rewrite(self) -> None:
        _close(self._file)
        columns = self._columns()
        heading = _csv_lines([dict(zip(columns, columns, strict=True))], columns) if columns else ""
        _replace(self.path, heading + _csv_lines(self._rows, columns))
        self._file = self.path.open("a", encoding="utf-8", newline="")


class TensorBoard:
    """Scalars for TensorBoard, one per name and epoch.

    Event files that an earlier start of the same run left in the directory are replaced; other
    files there are left alone.

    Args:
      directory: of the event files; made if absent.

    Raises:
      ModuleNotFoundError: tensorboardX is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            import tensorboardX
        except ModuleNotFoundError as error:
            raise _missing("TensorBoard logs", "tensorboardX", "tensorboard", error) from error
        self.directory = Path(directory)
        self._make = tensorboardX.SummaryWriter
        self._writer: Any = None

    def start(self, history: Sequence[Row]) -> None:
        for old in self.directory.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._writer = self._make(logdir=str(self.directory), filename_suffix=SUFFIX)
        for row in history:
            self._add(row)
        self._writer.flush()

    def log(self, row: Row) -> None:
        if self._writer is None:
            raise _not_started(self)
        self._add(row)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, row: Row) -> None:
        for name, value in row.items():
            if name != STEP:
                self._writer.add_scalar(name, float(value), int(row[STEP]))


class Wandb:
    """A run of Weights & Biases.

    The run's id is kept in ``directory``, so a run that is resumed continues the same page. Rows
    that the server has already are not sent again: an epoch that is repeated is the same bitwise,
    but for its duration.

    Args:
      project, name: as Weights & Biases shows them.
      directory: of its files, and of the id; made if absent.
      config: settings to show beside the run.
      mode: ``online``, or ``offline`` to write files that ``wandb sync`` sends later.

    Raises:
      ModuleNotFoundError: wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        name: str | None,
        directory: str | Path,
        config: Mapping[str, Any] | None = None,
        mode: Literal["online", "offline"] = "online",
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _missing("Weights & Biases logs", "wandb", "wandb", error) from error
        self.directory = Path(directory)
        self._init = wandb.init
        self._settings = {"project": project, "name": name, "config": config, "mode": mode}
        self._run: Any = None

    @property
    def id(self) -> str:
        """Of the run; made when first asked for, then kept in ``directory``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "wandb-id"
        if not path.exists():
            _replace(path, secrets.token_hex(8))
        return path.read_text()

    def start(self, history: Sequence[Row]) -> None:
        # offline nobody says what the server has: its first step is 0, and all rows are written
        is_online = self._settings["mode"] == "online"
        self._run = self._init(
            id=self.id,
            dir=str(self.directory),
            resume="allow" if is_online else None,
            **self._settings,
        )
        first = self._run.step
        for row in history:
            if row[STEP] >= first:
                self.log(row)

    def log(self, row: Row) -> None:
        if self._run is None:
            raise _not_started(self)
        values = {name: _plain(value) for name, value in row.items()}
        # with a step, wandb would hold a row back until the next one comes
        self._run.log(values, step=int(row[STEP]), commit=True)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _plain(value: Any) -> Value:
    """A number of numpy or jax as Python's own."""
    if isinstance(value, bool | int | float):
        return value
    return np.asarray(value).item()


def _json_line(row: Row) -> str:
    plain = {name: _plain(value) for name, value in row.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in plain.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _csv_lines(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        values = (row.get(name, "") for name in columns)
        writer.writerow([v if isinstance(v, str) else _plain(v) for v in values])
    return text.getvalue()


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8", newline="")
    scratch.replace(path)


def _append(file: TextIO | None, text: str, logger: Logger) -> None:
    if file is None:
        raise _not_started(logger)
    file.write(text)
    file.flush()


def _close(file: TextIO | None) -> None:
    if file is not None:
        file.close()


def _not_started(logger: Logger) -> ValueError:
    return ValueError(
        f"{type(logger).__name__} has not been started, so it has nowhere to write;\n"
        "call start(history) first, with () for a new run."
    )


def _missing(
    what: str, package: str, extra: str, error: ModuleNotFoundError
) -> ModuleNotFoundError:
    lacking = package if error.name == package else f"{error.name}, which {package} imports"
    return ModuleNotFoundError(
        f"{what} need {lacking}; it is not installed;\nuse pip install 'jaxft[{extra}]'."
    )
