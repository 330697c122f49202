"""Processes find one another, or learn who is missing; no JAX in it."""

import random
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from runtime.errors import InputError
from runtime.roll_call import call_roll
from tests.runtime.ports import free_port


def present(pool: ThreadPoolExecutor, port: int, count: int, index: int, timeout: float = 20.0) -> Future[None]:
    return pool.submit(call_roll, "localhost", port, count, index, timeout)


def test_all_are_told_when_the_last_has_come() -> None:
    port, order = free_port(), list(range(5))
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor() as pool:
        early = [present(pool, port, 5, index) for index in order[:-1]]
        time.sleep(0.3)
        assert not any(future.done() for future in early)
        for future in [*early, present(pool, port, 5, order[-1])]:
            assert future.result(20) is None
    # JAX's own service takes the port next.
    socket.create_server(("127.0.0.1", port)).close()


def test_everyone_present_names_all_who_are_missing() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        for future in [present(pool, port, 5, index, 1.0) for index in (0, 2)]:
            with pytest.raises(InputError, match="processes 1, 3, 4 have not joined within 1 s"):
                future.result(20)


def test_without_process_0_the_others_name_it() -> None:
    with pytest.raises(InputError, match="process 1 of 2: process 0 has not joined within 0 s"):
        call_roll("localhost", free_port(), 2, 1, 0.4)


def test_a_second_process_of_the_same_number_is_sent_away_and_a_restarted_one_is_not() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        zero = present(pool, port, 3, 0)
        stopped = connected(port)
        stopped.sendall(b"keye-jax 1 of 3\n")
        time.sleep(0.2)
        with pytest.raises(InputError, match="another process is process 1 already"):
            present(pool, port, 3, 1).result(20)
        stopped.close()
        for future in (present(pool, port, 3, 1), present(pool, port, 3, 2), zero):
            assert future.result(20) is None


def test_processes_that_disagree_about_their_number_are_sent_away() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        zero = present(pool, port, 2, 0, 2.0)
        with pytest.raises(InputError, match="process 0 was started for 2 processes and this one for 3"):
            present(pool, port, 3, 1).result(20)
        with pytest.raises(InputError, match="process 1 has not joined"):
            zero.result(20)


def test_strangers_on_the_port_are_ignored() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        zero = present(pool, port, 2, 0)
        for said in (b"GET / HTTP/1.1\n", b"keye-jax -1 of 2\n", b"keye-jax 1 of 2", b"\x00" * 2000 + b"\n"):
            with connected(port) as stranger:
                stranger.sendall(said)
        assert present(pool, port, 2, 1).result(20) is None
        assert zero.result(20) is None


def test_something_else_on_the_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def talk() -> None:
            connection, _ = other.accept()
            connection.recv(100)
            connection.sendall(b"220 ready\n")

        threading.Thread(target=talk, daemon=True).start()
        with pytest.raises(InputError, match="in use by something else"):
            call_roll("localhost", port, 2, 1, 5.0)
        with pytest.raises(InputError, match=f"cannot listen on port {port}"):
            call_roll("localhost", port, 2, 0, 5.0)


def connected(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            time.sleep(0.05)
    raise AssertionError("process 0 does not listen")
