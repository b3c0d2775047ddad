"""What the commands share."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    help="Fine-tune machine-learning interatomic potentials in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
evaluate_app = typer.Typer(help="Judge a bundle.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")
data_app = typer.Typer(help="Look at data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

console = Console(markup=False)  # names and paths may hold brackets
EXIT_INPUT, EXIT_DIVERGED, EXIT_PREEMPTED = 1, 3, 143


class Dtype(StrEnum):
    float32 = "float32"
    float64 = "float64"


class BackendName(StrEnum):
    auto = "auto"
    xla = "xla"
    cueq = "cueq"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Head = Annotated[str | None, typer.Option(help="Head, where the model has several.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of the user's input become one message and exit code 1, divergence exit code 3, being
    asked to stop 143."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            from jaxft.parallel import Refused

            _leave(error, EXIT_INPUT, is_common=isinstance(error, Refused))
        except RuntimeError as error:
            from jaxft.fit import NonFiniteError, Preempted

            if not isinstance(error, NonFiniteError | Preempted):
                raise
            is_preempted = isinstance(error, Preempted)
            _leave(error, EXIT_PREEMPTED if is_preempted else EXIT_DIVERGED, is_common=True)

    return wrapped


def _leave(error: Exception, code: int, *, is_common: bool) -> NoReturn:
    """Say what is wrong and exit.

    A process whose error the others do not share, and who wait for it, goes without a word to them:
    that is what they notice.
    """
    import jax

    what = "stopped" if code == EXIT_PREEMPTED else "error"
    print(f"{what}: {error}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and not is_common:
        os._exit(code)
    raise typer.Exit(code) from error


def use(dtype: str | None, backend: str = "auto") -> None:
    """Let JAX compute in ``dtype`` and keep its programs, if those of ``backend`` can be kept;
    before its first computation."""
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if backend == "cueq":
        from jaxft import compilation
        from jaxft.models import cueq

        compilation.disable_cache(cueq.NO_CACHE)
    else:
        keep_programs()


def keep_programs() -> Any:
    """Where compiled programs are kept: ``$JAXFT_XLA_CACHE``, a folder or ``off``, or the default.

    A default that cannot be used, in a container without a home say, is no reason to compute
    nothing, and is told on stderr; a folder that was asked for is an error.
    """
    from jaxft import compilation

    chosen = os.environ.get("JAXFT_XLA_CACHE")
    if chosen and chosen.lower() == "off":
        return compilation.disable_cache("JAXFT_XLA_CACHE=off")
    if chosen:
        try:
            return compilation.enable_cache(chosen)
        except OSError as error:
            raise ValueError(
                f"JAXFT_XLA_CACHE={chosen} cannot be used ({error});\nname a folder that can be "
                "made or written to, or `off`."
            ) from error
    try:
        return compilation.enable_cache()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nobody's home
        print(f"note: every run compiles anew: {error}", file=sys.stderr)
        return compilation.disable_cache("the default folder cannot be used")


def load(
    bundle: Path, dtype: Dtype | None, head: str | None, backend: str = "auto"
) -> tuple[Any, Any]:
    from jaxft import bundle as bundles

    model, params, _ = bundles.load_numpy(bundle)
    model.head_index(head)
    wanted = dtype.value if dtype else bundles.stored_dtype(params)
    use(wanted, backend)
    model, params = bundles.load(bundle, dtype=wanted)
    return model.with_backend(backend), params
