"""Programs: kept on disk and only where that is safe, compiled ahead, counted."""

import functools
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from typer.testing import CliRunner

import jaxft
from jaxft import compilation, data, finetune, loss, strategies
from jaxft.cli import app
from jaxft.compilation import Ahead, counting, disable_cache, enable_cache, shapes_of

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for programs; JAX's settings are put back afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_afresh(scale):
    """Compile a program that JAX does not know in this process; what that took."""
    jax.clear_caches()
    array = jnp.arange(7.0)
    with counting() as count:
        jax.jit(lambda x: jnp.sin(scale * x) + x)(array)
    return count


def test_a_kept_program_is_loaded_not_compiled_again(cache, tmp_path):
    assert enable_cache(cache).folder == cache
    first = compile_afresh(3.25)
    assert (first.compiled, first.loaded) == (1, 0)
    again = compile_afresh(3.25)
    assert (again.compiled, again.loaded) == (0, 1)
    other = compile_afresh(3.5)
    assert (other.compiled, other.loaded) == (1, 0)
    moved = enable_cache(tmp_path / "moved").folder
    compile_afresh(3.75)
    assert len(list(moved.glob("*-cache"))) > 0


def test_the_folder_is_its_owners_alone(cache, tmp_path):
    assert enable_cache(cache).folder.stat().st_mode & 0o777 == 0o700
    jax.config.update("jax_compilation_cache_dir", None)
    umask = os.umask(0)
    try:
        default = enable_cache().folder
    finally:
        os.umask(umask)
    assert default.is_relative_to(tmp_path / "jaxft" / "xla")
    for made in (default, default.parent, tmp_path / "jaxft"):
        assert made.stat().st_mode & 0o777 == 0o700


def test_programs_that_others_can_change_are_refused(cache):
    cache.mkdir(mode=0o755)
    program = cache / "jit_step-cache"
    program.touch()
    assert enable_cache(cache).folder == cache
    program.chmod(0o666)
    with pytest.raises(ValueError, match=f"write to {program} "):
        enable_cache(cache)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(ValueError, match=rf"mode {mode:o}.*\n.*chmod go-w .*JAXFT_XLA_CACHE=off"):
        enable_cache(cache)
    assert jax.config.jax_compilation_cache_dir is None
    assert list(cache.iterdir()) == []


def test_a_folder_that_others_can_exchange_is_refused(cache, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ValueError, match=f"write to {shared} "):
        enable_cache(shared / "mine")
    link = tmp_path / "link"
    link.symlink_to(shared / "mine")
    with pytest.raises(ValueError, match=f"write to {shared} "):
        enable_cache(link)
    shared.chmod(0o1777)  # like /tmp
    assert enable_cache(shared / "mine").folder == shared / "mine"


def test_what_jax_was_given_is_respected(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert enable_cache() == (tmp_path / "own", "set before")
    assert jax.config.jax_persistent_cache_min_compile_time_secs > 0
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable_cache(cache).folder is None
    assert not cache.exists()


def test_an_unsafe_backend_keeps_nothing(cache):
    enable_cache(cache)
    assert compilation.cache() == (cache, "in use")
    off = disable_cache("programs hold handles of this process")
    assert compilation.cache() == (None, "switched off")
    assert str(off) == "not kept: programs hold handles of this process"
    assert compile_afresh(4.75).compiled == 1
    assert compile_afresh(4.75).compiled == 1
    assert list(cache.iterdir()) == []


def test_programs_used_longest_ago_are_deleted(cache):
    cache.mkdir(mode=0o700)
    for age, name in enumerate(("new", "middle", "old")):
        (cache / f"{name}-cache").write_bytes(b"x" * 100)
        os.utime(cache / f"{name}-cache", (1e9 - age, 1e9 - age))
    (cache / "no program").write_bytes(b"x" * 100)
    found = enable_cache(cache, max_bytes=250)
    assert {path.name for path in cache.iterdir()} == {"new-cache", "middle-cache", "no program"}
    assert "2 programs" in str(found)


def test_commands_keep_programs_where_the_environment_says(cache, monkeypatch, small, tmp_path):
    bundle = tmp_path / "small.jaxft"
    jaxft.save(bundle, *small)
    for value, expected in (
        (str(cache), f"kept in {cache} (as asked for; 0 programs"),
        ("", f"kept in {tmp_path / 'jaxft' / 'xla'}"),
        ("off", "not kept: JAXFT_XLA_CACHE=off"),
        ("OFF", "not kept: JAXFT_XLA_CACHE=off"),
    ):
        monkeypatch.setenv("JAXFT_XLA_CACHE", value)
        jax.config.update("jax_compilation_cache_dir", None)
        result = CliRunner().invoke(app, ["info", str(bundle)])
        assert expected in result.stdout, result.output
    (tmp_path / "file").touch()
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    for wrong in (tmp_path / "file", tmp_path / "file" / "folder"):
        monkeypatch.setenv("JAXFT_XLA_CACHE", str(wrong))
        result = CliRunner().invoke(app, ["info", str(bundle)])
        assert result.exit_code == 1
        assert "error: " in result.output
    monkeypatch.delenv("JAXFT_XLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = CliRunner().invoke(app, ["info", str(bundle)])
    assert result.exit_code == 0
    assert "not kept: the default folder cannot be used" in result.stdout
    assert "note: every run compiles anew: " in result.stderr


def test_the_library_changes_nothing_and_programs_know_their_devices():
    program = """
        import jax
        settings = dict(jax.config.values)
        import jaxft
        from jaxft import compilation
        assert jax.config.values == settings
        assert jax.config.jax_compilation_cache_dir is None

        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        spread, whole = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (["data"], []))
        double = compilation.Ahead(jax.jit(lambda x: 2 * x))
        ones = jax.numpy.ones(4)
        for x in (ones, jax.device_put(ones, spread), jax.device_put(ones, whole), double(ones),
                  jax.device_put(ones, jax.devices()[1]), double(jax.device_put(ones, spread))):
            y = double(x)
            assert y.sharding.is_equivalent_to(x.sharding, 1), (y.sharding, x.sharding)
            assert (y == 2 * x).all()
        assert double.compilations == 4, double.compilations
        double.settle()
        double(jax.device_put(jax.numpy.ones(6), spread))
        assert "float32[4] on" in double.unexpected[0], double.unexpected
        assert "spec=P('data',)" in double.unexpected[0], double.unexpected
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX")}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
        check=True,
    )


def gated(gates, log=None):
    """A jitted function whose tracing waits for the gate of its size; it donates its argument."""

    @functools.partial(jax.jit, donate_argnums=0)
    def function(x):
        if log is not None:
            log.append((x.shape[0], threading.current_thread() is threading.main_thread()))
        assert gates[x.shape[0]].wait(60)
        if x.shape[0] == 5:
            raise ValueError("five")
        return x + 1

    return function


def struct(n):
    return (jax.ShapeDtypeStruct((n,), jnp.float32),)


def ones(n):
    return jnp.ones(n, jnp.float32)


def test_a_program_under_way_is_waited_for():
    gates, log = {3: threading.Event()}, []
    function = Ahead(gated(gates, log))
    function.start([struct(3), struct(3)])
    assert function.compilations == 0
    threading.Timer(0.05, gates[3].set).start()
    assert function(ones(3)).tolist() == [2, 2, 2]
    assert function.compilations == 1
    assert log == [(3, False)]


def test_a_program_in_the_queue_is_compiled_by_who_needs_it():
    gates, log = {3: threading.Event(), 4: threading.Event()}, []
    gates[4].set()
    pool = ThreadPoolExecutor(1)
    function = Ahead(gated(gates, log), pool=pool)
    function.start([struct(3), struct(4)])
    function.settle()  # it was announced, so it is expected
    assert function(ones(4)).tolist() == [2, 2, 2, 2]  # while 3 is still under way
    gates[3].set()
    function(ones(3))
    function.close()
    assert function.unexpected == []
    assert sorted(log) == [(3, False), (4, True)]


def test_errors_of_the_background_surface_at_the_call():
    gates = {n: threading.Event() for n in (4, 5)}
    for gate in gates.values():
        gate.set()
    function = Ahead(gated(gates))
    function.start([struct(5), struct(4)])
    assert function(ones(4)).tolist() == [2, 2, 2, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="five"):
            function(ones(5))


def test_donation_survives():
    function = Ahead(jax.jit(lambda state, x: state + x.sum(), donate_argnums=0))
    function.start([(*struct(3), *struct(4))])
    state, x = ones(3), ones(4)
    assert function(state, x).tolist() == [5, 5, 5]
    assert state.is_deleted()
    assert not x.is_deleted()


def test_a_compilation_after_the_first_epoch_is_reported_with_its_cause():
    said = []
    function = Ahead(jax.jit(lambda x: x["a"].sum() + x["b"].sum()), report=said.append)
    function({"a": ones(3), "b": ones(4)})
    function({"a": ones(30), "b": ones(40)})
    function.settle()
    function({"a": ones(3), "b": ones(4)})
    assert function.unexpected == []
    function({"a": ones(3), "b": ones(5)})
    function({"a": np.ones(3), "b": ones(4)})
    first, second = function.unexpected
    assert first == "compiled once more, for [0]['b']: float32[5], not float32[4]"
    assert "[0]['a']: float64[3], not float32[3]" in second
    assert said == [first, second]
    function.start([({"a": ones(6), "b": ones(6)},)])  # announced, so expected
    function({"a": ones(6), "b": ones(6)})
    assert len(function.unexpected) == 2
    assert function.compilations == 5


def test_weak_types_are_kept_apart_and_mean_what_they_mean_to_jit():
    jitted = jax.jit(lambda x, y: x * y)
    function = Ahead(jitted)
    weak, strong = jnp.asarray(2.0), jnp.asarray(2.0, jnp.float64)
    assert weak.weak_type
    assert not strong.weak_type
    for y in (weak, strong, np.float64(2.0)):
        expected = jitted(ones(3), y)
        found = function(ones(3), y)
        assert (found.dtype, found.weak_type) == (expected.dtype, expected.weak_type)
    assert function.compilations == 2
    with pytest.raises(TypeError, match=r"given 2.0, a float; it takes arrays.\nUse jnp.asarray"):
        function(ones(3), 2.0)


@pytest.mark.parametrize(
    "recipe", [(), (strategies.lora(rank=1, also_train="readouts_*/**"),)], ids=["full", "lora"]
)
def test_a_step_returns_a_state_of_the_shapes_that_it_was_given(small, structures, recipe):
    """So that the second update needs no second program."""
    model, params = small
    dataset = data.prepare([data.from_atoms(atoms) for atoms in structures], model)
    (batch,) = data.epoch(dataset, len(structures))
    objective = loss.weighted(model, energy=1.0, forces=1.0, stress=10.0)
    init, step = finetune(objective, recipe, optax.adamw(optax.cosine_decay_schedule(1e-3, 9)))
    state = init(jax.random.key(0), params)
    after, _ = jax.eval_shape(step, state, batch)
    assert shapes_of(after) == shapes_of(state)


def test_counting_ends():
    with counting() as count:
        pass
    compile_afresh(5.5)
    assert (count.compiled, count.loaded, count.seconds) == (0, 0, 0.0)
    assert compilation.Count(2, 1, 0.5) == compilation.Count(compiled=2, loaded=1, seconds=0.5)
    assert str(compilation.Count(2, 1, 0.5)) == "2 programs compiled, 1 loaded, 0.5 s"
