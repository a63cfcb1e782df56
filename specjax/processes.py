"""Several processes that run one program: they join before JAX looks for devices, agree on what to run, end together.

Each process runs the same Python over the same inputs, so all of them compile the same programs in the same order.
What could differ between them (what is on disk, what a clock said) is taken from process 0, which alone writes results.
"""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax

from specjax.errors import ConfigError, SpecJAXError

WAIT_SECONDS = 86_400
"""How long a process waits for another to get as far as itself; one that died or failed is noticed much sooner."""

POLL_SECONDS = 0.5
"""Time between two looks for a failure of another process."""

FAILED = "specjax/failed"
CHUNK_BYTES = 1 << 20
SHOWN = 200
"""Characters of a value that are sent to be compared; of longer ones only a digest."""


@dataclasses.dataclass(frozen=True)
class Distributed:
    """How processes find each other: the arguments of jax.distributed.initialize.

    Attributes:
        enabled: whether there may be several.
        coordinator_address: "HOST:PORT" where process 0 listens; None for $JAX_COORDINATOR_ADDRESS, or as JAX finds it
            (Cloud TPU, Slurm, Open MPI, Kubernetes).
        num_processes: None as JAX finds it.
        process_id: of this process, 0 <= process_id < num_processes; None as JAX finds it.
        initialization_timeout: seconds that processes wait for each other at the start.
        heartbeat_timeout_seconds: after which a process that is silent counts as dead, and all end.
    """

    enabled: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 300
    heartbeat_timeout_seconds: int = 30

    def __post_init__(self) -> None:
        num, index = self.num_processes, self.process_id
        if num is not None and num < 1:
            raise ConfigError(f"config.distributed.num_processes={num}: expected an integer >= 1, or None.")
        if index is not None and not 0 <= index < (num or index + 1):
            raise ConfigError(
                f"config.distributed.process_id={index}: expected 0 <= process_id < num_processes={num}, or None."
            )
        address = self.coordinator_address
        if address is not None and not address.rpartition(":")[2].isdecimal():
            raise ConfigError(
                f"config.distributed.coordinator_address={address!r}: expected 'HOST:PORT', such as '10.0.0.1:8476'."
            )
        for name in ("initialization_timeout", "heartbeat_timeout_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.distributed.{name}={getattr(self, name)}: expected seconds >= 1.")

    @classmethod
    def from_config(cls, field: Any) -> "Distributed":
        """The frozen form of a config's field: a bool, a mapping, or None for a config without it.

        Raises:
            ConfigError: an unknown name, or a wrong value.
        """
        if field is None or isinstance(field, bool):
            return cls(enabled=bool(field))
        if isinstance(field, cls):
            return field
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in field:
            if name not in known:
                raise ConfigError(
                    f"config.distributed.{name}={field[name]!r}: is no field; expected some of {', '.join(known)}."
                )
        return cls(**{name: value for name, value in field.items() if value is not None})


def join(field: Any) -> None:
    """Joins the processes that a config's field `distributed` describes; call it before anything that asks for devices.

    From here on an error in one process ends all of them, each with a message that names the process and the error. A
    second call does nothing.

    Raises:
        ConfigError: JAX cannot find out what the field leaves open, or has looked for devices already.
        SpecJAXError: the others did not come.
    """
    settings = Distributed.from_config(field)
    if not settings.enabled or _watch.started:
        return
    if not jax.distributed.is_initialized():
        _initialize(settings)
    if jax.process_count() > 1:
        _watch.start(settings.heartbeat_timeout_seconds)


def _initialize(settings: Distributed) -> None:
    fields = dataclasses.asdict(settings)
    fields.pop("enabled")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(**fields)
    except ValueError as error:  # what neither the arguments nor the surroundings say
        raise ConfigError(
            f"config.distributed: {str(error).strip()} JAX did not find it in the surroundings (Cloud TPU, Slurm, Open "
            "MPI, Kubernetes); set coordinator_address, num_processes and process_id."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise SpecJAXError(
            f"config.distributed: not all of {settings.num_processes or 'the'} processes met at "
            f"{settings.coordinator_address or 'the coordinator'} within {settings.initialization_timeout} s "
            f"({_first_line(error)}); start them all with the same config, but for process_id."
        ) from error
    except RuntimeError as error:
        raise ConfigError(
            f"config.distributed: {error} Join before the first use of JAX, in a process of its own."
        ) from error


def index() -> int:
    """Of this process; 0 where there is one."""
    return jax.process_index()


def is_writer() -> bool:
    """Whether this process is the one that writes results and talks to the user."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here.

    Raises:
        SpecJAXError: one did not come.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(f"specjax/barrier/{next(_number)}/{name}", 1000 * WAIT_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise SpecJAXError(_lost(name, error)) from error


def of_first(value: Any) -> Any:
    """Process 0's value on every process: of what JSON can hold, such as a measured time."""
    if jax.process_count() == 1:
        return value
    return json.loads(_send(json.dumps(value).encode() if is_writer() else None).decode())


def same_everywhere(value: Mapping[str, Any], what: str) -> None:
    """Checks that all processes have the same, so that they never run different programs.

    Args:
        value: names -> what JSON can hold.
        what: it is, for the message: "config" gives "config.NAME=...".

    Raises:
        ConfigError: on process 0, and on each process that differs from it; names what differs.
    """
    if jax.process_count() == 1:
        return
    mine = {name: _shown(part) for name, part in value.items()}
    place = f"specjax/same/{next(_number)}"
    _client().key_value_set(f"{place}/{index()}", json.dumps(mine))
    for other in range(1, jax.process_count()) if is_writer() else (0,):
        theirs = json.loads(_get(f"{place}/{other}", what))
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{what}.{name}={mine.get(name)} on process {index()}, {theirs.get(name)} on process {other}: "
                    "expected the same on every process, because all of them run the same programs; start them with "
                    "equal configs and files."
                )


@contextlib.contextmanager
def own_folder(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """The folder itself on process 0; on the others one of their own that holds copies of some of its files.

    So all processes read the same and write what they like, but only what process 0 writes is kept.

    Args:
        names: of the files; those that are not there are left out.
    """
    if jax.process_count() == 1:
        yield folder
        return
    present = of_first([name for name in names if (folder / name).is_file()])
    contents = {name: _send((folder / name).read_bytes() if is_writer() else None) for name in present}
    if is_writer():
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in contents.items():
            (Path(scratch) / name).write_bytes(content)
        yield Path(scratch)


def end_all(message: str, code: int) -> None:
    """Where there are several processes: ends this one, and the others with a message that names it. Else nothing.

    Args:
        message: why, as the user of another process reads it; it has been printed here already.
        code: exit code.
    """
    if _watch.started:
        _watch.end_all(message, code)


class _Watch:
    """Sees in the background whether another process has failed, and tells the others if this one does."""

    def __init__(self) -> None:
        self.started = False
        self._lock = threading.Lock()
        self._patience = 0

    def start(self, patience: int) -> None:
        """patience: seconds after which JAX says itself which process has died."""
        self.started, self._patience = True, patience
        self._hook = sys.excepthook
        sys.excepthook = self._on_error
        threading.Thread(target=self._run, name="specjax-watch", daemon=True).start()

    def _run(self) -> None:
        client = _client()
        while True:
            time.sleep(POLL_SECONDS)
            try:
                failed = json.loads(client.key_value_try_get(FAILED))
            except jax.errors.JaxRuntimeError:
                continue  # nothing there; where the coordinator is gone, JAX ends this process
            if failed["process"] != index():
                self._leave(f"process {failed['process']} failed: {failed['message']}", failed["code"])

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An error that nobody caught."""
        self._hook(kind, error, trace)
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            # Most often because another process is gone. JAX names it when it notices, and ends this one.
            print(
                f"specjax: process {index()} of {jax.process_count()}: a computation across processes failed, as it "
                f"does when another process dies; within {self._patience} s JAX says which.",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(self._patience + 2 * POLL_SECONDS)
        self.end_all("".join(traceback.format_exception_only(kind, error)).strip(), 1)

    def end_all(self, message: str, code: int) -> NoReturn:
        failed = {"process": index(), "message": message, "code": code}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the coordinator is gone
            _client().key_value_set(FAILED, json.dumps(failed))
        if is_writer():  # the others ask this process, so it stays until they have
            time.sleep(4 * POLL_SECONDS)
        self._leave(None, code)

    def _leave(self, message: str | None, code: int) -> NoReturn:
        """Ends without waiting for anybody, as the ordinary end of a JAX process would."""
        with self._lock:
            if message:
                print(f"specjax: error: {message}\nspecjax: process {index()} ends too.", file=sys.stderr)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)


_watch = _Watch()
_number = itertools.count()
"""Numbers what processes tell each other: all do so in the same order."""


def _client() -> Any:
    from jax._src import distributed  # the only way to the keys and values that processes share

    client = distributed.global_state.client
    if client is None:
        raise SpecJAXError(
            f"jax.process_count()={jax.process_count()}: these processes have no coordinator; call "
            "jax.distributed.initialize() or specjax.processes.join() first."
        )
    return client


def _send(content: bytes | None) -> bytes:
    """Bytes of process 0 to all; the others give None."""
    place = f"specjax/sent/{next(_number)}"
    if content is not None:
        parts = [content[first : first + CHUNK_BYTES] for first in range(0, len(content), CHUNK_BYTES)]
        for number, part in enumerate(parts):
            _client().key_value_set(f"{place}/{number}", base64.b64encode(part).decode())
        _client().key_value_set(f"{place}/count", str(len(parts)))
        return content
    count = int(_get(f"{place}/count", "its data"))
    return b"".join(base64.b64decode(_get(f"{place}/{number}", "its data")) for number in range(count))


def _get(key: str, what: str) -> str:
    try:
        value: str = _client().blocking_key_value_get(key, 1000 * WAIT_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise SpecJAXError(_lost(what, error)) from error
    return value


def _lost(what: str, error: Exception) -> str:
    return (
        f"process {index()} of {jax.process_count()}: waited in vain for the others at {what!r} "
        f"({_first_line(error)}); see their output for why they did not come."
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= SHOWN else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
