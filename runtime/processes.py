"""Several processes that run one program on one prompt, each with its own devices: JAX's multi-controller way.

`jax.distributed` joins them. What they must agree on besides arrays goes through the store of JAX's coordination
service, which process 0 hosts: process 0's bytes for all (`shared`), and the one end of the run. A thread in each
process looks for that end, so that an error or Ctrl-C anywhere ends all of them, wherever they are, with one exit code.
A process that dies without a word is noticed by JAX, which ends the others after HEARTBEAT_SECONDS, or at once if it
was process 0.
"""

import contextlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from runtime.errors import InputError
from runtime.roll_call import LOOPBACK, call_roll

JOIN_SECONDS = 300.0
"""How long processes wait for one another at the start."""
HEARTBEAT_SECONDS = 30
"""After so long without a sign of life a process counts as dead."""

_CONNECT_SECONDS = 60
_WAIT_SECONDS = 24 * 3600
"""Longer than anything takes: what ends waiting is the end of the process that is waited for."""
_POLL_SECONDS = 0.25
_LAST_SECONDS = 10.0
"""How long process 0 stays for the others to hear of the end: the store goes with it."""
_MAX_PROCESSES = 65536
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
# Launchers that say in each process's environment how many they started, and that jax.distributed knows.
_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_END = "keye-jax/end"


class Processes:
    """The processes of a run, as one of them sees the others. All must make the same calls in the same order."""

    def __init__(self, index: int = 0, count: int = 1, store: Any = None):
        """`store`: the client of JAX's coordination service, where there are several processes."""
        self.index = index
        self.count = count
        self._store = store
        self._calls = 0
        self._leaving = threading.Event()
        self._watch = threading.Thread(target=self._look_for_the_end, daemon=True)
        if count > 1:
            self._watch.start()

    @property
    def prefix(self) -> str:
        """What stands before messages of this process."""
        return f"process {self.index}: " if self.count > 1 else ""

    def shared(self, make: Callable[[], bytes]) -> bytes:
        """What `make` gives in process 0, in all of them; only process 0 calls it."""
        if self.count == 1:
            return make()
        self._calls += 1
        key = f"keye-jax/{self._calls}"
        if self.index == 0:
            value = make()
            self._store.key_value_set_bytes(key, value)
            return value
        while True:
            try:
                return self._store.blocking_key_value_get_bytes(key, 1000)
            except RuntimeError as error:
                # In slices, so that Ctrl-C is heard; an end of process 0 ends this one as well.
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def wait(self) -> None:
        """Returns once all processes have come here."""
        if self.count > 1:
            self._calls += 1
            self._store.wait_at_barrier(f"keye-jax/{self._calls}", _WAIT_SECONDS * 1000)

    def same(self, facts: Mapping[str, str]) -> None:
        """Compares what all processes must have alike: what it is → a digest or value.

        Raises:
            InputError: in a process that differs from process 0, which ends all of them.
        """
        first = json.loads(self.shared(lambda: json.dumps(dict(facts)).encode()))
        other = [name for name, fact in facts.items() if first.get(name) != fact]
        if other:
            raise InputError(
                f"this process has other {', '.join(other)} than process 0; start all of them with the same "
                "command, files and packages"
            )

    def end(self, code: int, reason: str = "") -> int:
        """Ends this process's part of the run. After success it waits for process 0's word; otherwise it does not
        return, and the others end too.

        Args:
            code: exit code.
            reason: why, for the others to say; empty where nothing needs to be said.

        Returns:
            The exit code, the same in all processes.
        """
        if self.count == 1:
            return code
        if code == 0 and self.index > 0:
            try:
                self._watch.join()
            except KeyboardInterrupt:
                return self.end(130, "interrupted")
            return 0
        self._leaving.set()
        own = f"process {self.index}: {reason}" if reason else ""
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(_END, json.dumps([code, own]))
        with contextlib.suppress(RuntimeError):
            # Whoever was first has said what all end with; this one may have met only what came of it.
            code, said = json.loads(self._store.key_value_try_get(_END))
            if said and said != own:
                print(f"error: {said}", file=sys.stderr)
        if code:
            self._leave(code)
        # JAX takes the store away when Python ends.
        self._watch.join()
        return 0

    def _look_for_the_end(self) -> None:
        while not self._leaving.wait(_POLL_SECONDS):
            try:
                code, reason = json.loads(self._store.key_value_try_get(_END))
            except RuntimeError:
                continue
            if code == 0:
                return
            if reason:
                print(f"error: {reason}", file=sys.stderr)
            self._leave(code)

    def _leave(self, code: int) -> None:
        """Ends this process at once: its devices may wait for others that have gone, and so would Python's own end."""
        deadline = time.monotonic() + _LAST_SECONDS
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{_END}ed/{self.index}", "", True)
            while self.index == 0 and (silent := self._silent()):
                if time.monotonic() > deadline:
                    print(f"no answer from {', '.join(silent)}", file=sys.stderr)
                    break
                time.sleep(_POLL_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    def _silent(self) -> list[str]:
        heard = {key for key, _ in self._store.key_value_dir_get(f"{_END}ed/")}
        return [f"process {n}" for n in range(self.count) if f"{_END}ed/{n}" not in heard]


ALONE = Processes()
"""One process."""


def join(coordinator: str | None, count: int | None, index: int | None) -> Processes:
    """Joins the processes of this run; ALONE if there is one. Comes before anything that touches a device.

    Args:
        coordinator: HOST:PORT of process 0, as all processes reach it. None, with the other two: what the launcher or
            the TPU's environment says, or one process where nothing does.

    Raises:
        InputError: wrong options, or some processes are missing after JOIN_SECONDS.
    """
    devices = None
    if (coordinator, count, index) == (None, None, None):
        if not _launched():
            return ALONE
        coordinator, count, index, devices = _detected()
        if count in (None, 1):
            return ALONE
    if coordinator is None or count is None or index is None:
        raise InputError("--coordinator, --num-processes and --process-id go together; give all three or none")
    found = _ADDRESS.fullmatch(coordinator)
    if found is None or not 0 < int(found[2]) < 65536:
        raise InputError(f"--coordinator {coordinator!r:.80} must be HOST:PORT of process 0, such as 10.0.0.1:8476")
    if not 1 <= count <= _MAX_PROCESSES:
        raise InputError(f"--num-processes {count} must be from 1 to {_MAX_PROCESSES}")
    if not 0 <= index < count:
        raise InputError(f"--process-id {index} must be from 0 to {count - 1}, one less than --num-processes")
    if count == 1:
        return ALONE
    host, port = found[1], int(found[2])
    call_roll(host, port, count, index, JOIN_SECONDS)
    return _joined(host, port, count, index, devices)


def _launched() -> bool:
    """Whether something may have started several processes; importing JAX to ask it would delay every start.

    TPU hosts are asked for by the package that drives them: whether such a host is part of a pod stands in the
    environment on Kubernetes, and elsewhere only in the metadata server, which JAX queries.
    """
    started = [os.environ.get(name, "") for name in _LAUNCHED]
    return any(n.isdecimal() and int(n) > 1 for n in started) or importlib.util.find_spec("libtpu") is not None


def _detected() -> tuple[Any, ...]:
    """Coordinator, number of processes, this one's, and its device numbers, as JAX finds them; Nones if it does not."""
    # What `jax.distributed.initialize` without arguments does first; only so can the missing ones be named.
    from jax._src.clusters import ClusterEnv

    try:
        return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(JOIN_SECONDS))
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"this machine seems to be part of a cluster that JAX cannot read ({error!s:.200}); give --coordinator, "
            "--num-processes (1 if this process is alone) and --process-id"
        ) from None


def _joined(host: str, port: int, count: int, index: int, devices: Any) -> Processes:
    import jax
    from jax._src import distributed

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself, and nothing here saves a state.
    jax.config.update("jax_enable_preemption_service", False)
    _keep_stdout()
    try:
        jax.distributed.initialize(
            f"{host}:{port}",
            count,
            index,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            coordinator_bind_address=f"{host}:{port}" if host in LOOPBACK else None,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"JAX cannot join process {index} ({error!s:.300}); see what the others say") from None
    # No public name leads to the store; Orbax takes it from here too.
    return Processes(index, count, distributed.global_state.client)


def _keep_stdout() -> None:
    """Gives Python's stdout a file descriptor of its own: gloo and NCCL announce themselves on number 1."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
