"""Who is there: process 0 hears from every other process before JAX joins them, and all learn which are missing.

JAX cannot say it. With a process missing, `jax.distributed.initialize` of 0.10 to 0.12 ends those present from C++ with a
stack trace, code 134 and no name. So on the coordinator's port, until JAX's own service takes it over, each process says
one line, `keye-jax 2 of 4`, and hears one: `all are here`, `missing 1,3` or `refused REASON`. After that JAX does the rest.
"""

import contextlib
import re
import socket
import time
from collections.abc import Iterable

from runtime.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Hosts that stand for this machine alone."""

_RETRY_SECONDS = 0.2
_LINE_SECONDS = 2.0
"""For a line that should come at once; whoever connects and is silent keeps the others waiting so long."""
_SPARE_SECONDS = 10.0
_MAX_LINE = 1 << 19
"""Holds the numbers of as many processes as there can be."""
_PRESENT = re.compile(rb"keye-jax (\d{1,6}) of (\d{1,6})\n")
_WORD = re.compile(rb"(all are here|missing ([\d,]+)|refused ([ -~]+))\n")


def call_roll(host: str, port: int, count: int, index: int, timeout: float) -> None:
    """Returns once all processes have said that they are there.

    Args:
        host: of process 0, as all processes reach it; an IPv6 address in brackets.
        index: of this process, from 0 to count - 1.
        timeout: seconds to wait for the others.

    Raises:
        InputError: some are missing, and which; another process has the same number; the port is taken.
    """
    missing = _listen(host, port, count, timeout) if index == 0 else _report(host, port, count, index, timeout)
    if missing:
        names = f"process {missing[0]} has" if len(missing) == 1 else f"processes {_listed(missing)} have"
        raise InputError(
            f"process {index} of {count}: {names} not joined within {timeout:.0f} s; start each with this command and "
            f"its own --process-id, or see in its output why it ended"
        )


def _listed(numbers: list[int]) -> str:
    most = 20
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


def _listen(host: str, port: int, count: int, timeout: float) -> list[int]:
    """Process 0: hears the others, and tells them who is missing."""
    deadline = time.monotonic() + timeout
    here: dict[int, socket.socket] = {}
    with _server(host, port) as server:
        while len(here) < count - 1 and time.monotonic() < deadline:
            server.settimeout(max(0.01, min(1.0, deadline - time.monotonic())))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                pass
            else:
                _hear(connection, here, count)
            # Whoever was stopped meanwhile may be started again.
            here = {number: known for number, known in here.items() if not _gone(known)}
    missing = sorted(set(range(1, count)) - here.keys())
    _tell(here.values(), f"missing {','.join(map(str, missing))}" if missing else "all are here")
    return missing


def _server(host: str, port: int) -> socket.socket:
    try:
        if host in LOOPBACK:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host.strip("[]"), port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise InputError(f"process 0 cannot listen on port {port} ({error.strerror}); choose another one") from None


def _hear(connection: socket.socket, here: dict[int, socket.socket], count: int) -> None:
    """Adds who has connected to those `here`, or sends it away."""
    said = _PRESENT.fullmatch(_line(connection, _LINE_SECONDS))
    if said is None:
        connection.close()
        return
    number, total = int(said[1]), int(said[2])
    if total != count:
        reason = f"process 0 was started for {count} processes and this one for {total}"
    elif not 0 < number < count or (number in here and not _gone(here[number])):
        reason = f"another process is process {number} already"
    else:
        here[number] = connection
        return
    _tell([connection], f"refused {reason}")


def _report(host: str, port: int, count: int, index: int, timeout: float) -> list[int]:
    """The others: finds process 0 and hears its word."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host.strip("[]"), port), _LINE_SECONDS) as connection,
        ):
            connection.sendall(f"keye-jax {index} of {count}\n".encode())
            # Process 0 may have come later, and waits as long.
            line = _line(connection, timeout + _SPARE_SECONDS)
            word = _WORD.fullmatch(line)
            if word is None and line:
                raise InputError(f"{host}:{port} is in use by something else; choose another port")
            if word is not None and word[3]:
                raise InputError(f"{word[3].decode()}; correct --process-id or --num-processes")
            if word is not None:
                return [int(number) for number in (word[2] or b"").split(b",") if number]
        time.sleep(_RETRY_SECONDS)
    return [0]


def _line(connection: socket.socket, seconds: float) -> bytes:
    """What comes up to a line's end; less if the time is over or the other side closes."""
    received, deadline = b"", time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while not received.endswith(b"\n") and len(received) < _MAX_LINE:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            more = connection.recv(_MAX_LINE - len(received))
            if not more or time.monotonic() > deadline:
                break
            received += more
    return received


def _tell(connections: Iterable[socket.socket], word: str) -> None:
    connections = list(connections)
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(f"{word}\n".encode())
    for connection in connections:
        # The other side closes first: otherwise the port would stay in use for a minute.
        _line(connection, _LINE_SECONDS)
        connection.close()


def _gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
