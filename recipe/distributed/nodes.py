"""Several machines that train together: they meet before the start, and each notices when another one is gone.

A node is one machine. `meet` runs before torch.distributed.run, which waits ten minutes for a missing node and does not
name it. `watch` runs during the training, where a collective waits half an hour for a node that is gone.
"""

import atexit
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple, Self

from recipe import console
from recipe.console import UserError

CONNECT_TIMEOUT = 5  # seconds for one attempt to connect, and for a greeting to arrive
RETRY = 0.5  # seconds between two attempts
ANSWER_TIMEOUT = 10  # seconds that node 0 may need, after its own timeout, to send its answer
LONGEST_MESSAGE = 10_000  # bytes
GONE = 3  # exit code of a node that stops because another one is gone

# ----------------------------------------------------------------------------------------------------------------------
# Before the start


class Connected(NamedTuple):
    """Another node that has connected to node 0."""

    node: int
    host: str
    connection: socket.socket


def meet(nnodes: int, node_rank: int, addr: str, port: int, timeout: float = 60) -> None:
    """Wait until all nodes have come; node 0 listens at addr:port, the others connect to it.

    Args:
        timeout: seconds that each node waits, from its own start.
    Raises:
        UserError: a node has not come, cannot reach node 0, or was started with other numbers; raised on all nodes
            that have come.
    """
    if node_rank == 0:
        _receive(nnodes, addr, port, timeout)
    else:
        _greet(nnodes, node_rank, addr, port, timeout)


def _receive(nnodes: int, addr: str, port: int, timeout: float) -> None:
    """Run on node 0: wait for all others, then send each the same answer, a problem or None."""
    print(f"node 0 of {nnodes}: waiting for the others at {addr}:{port}, at most {timeout} s", flush=True)
    deadline = time.monotonic() + timeout
    came: list[Connected] = []
    problem: str | None = "node 0 was stopped before all nodes had come."
    try:
        with _listening(port) as server:
            while len(came) < nnodes - 1:
                _accept(server, nnodes, came)
                # One that was stopped may have been started again.
                came[:] = [other for other in came if not _hung_up(other.connection)]
                _refuse_duplicates(came, nnodes)
                if time.monotonic() > deadline:
                    missing = sorted({*range(1, nnodes)} - {other.node for other in came})
                    raise UserError(_missing(missing, nnodes, addr, port, timeout))
        problem = None
        print(f"all {nnodes} nodes have come", flush=True)
    except UserError as error:
        problem = str(error)
        raise
    finally:
        for other in came:
            with other.connection:
                _send(other.connection, {"problem": problem})


def _listening(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(_no_port(port, error)) from None  # any other error: IPv6 is switched off
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(_no_port(port, error)) from None


def _no_port(port: int, error: OSError) -> str:
    found = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
    return f"port {port} {found} on this machine, node 0; set another MASTER_PORT, the same on all nodes."


def _accept(server: socket.socket, nnodes: int, came: list[Connected]) -> None:
    """Add the next node to `came`; anything else that connects, such as a port scanner, is ignored."""
    server.settimeout(RETRY)
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return
    greeting = _read(connection, CONNECT_TIMEOUT)
    if isinstance(greeting, dict) and {"node", "nodes", "host"} <= set(greeting):
        came.append(Connected(greeting["node"], greeting["host"], connection))
        if greeting["nodes"] != nnodes:
            raise UserError(
                f"node {greeting['node']} ({greeting['host']}) was started with NNODES={greeting['nodes']}, node 0 "
                f"({socket.gethostname()}) with NNODES={nnodes}; set the same NNODES on all nodes."
            )
    else:
        connection.close()


def _refuse_duplicates(came: Iterable[Connected], nnodes: int) -> None:
    hosts: dict[int, str] = {}
    for node, host, _ in came:
        if node in hosts:
            raise UserError(
                f"two machines came as node {node} of {nnodes} ({hosts[node]} and {host}); set another NODE_RANK on "
                f"each, 0 to {nnodes - 1}."
            )
        hosts[node] = host


def _missing(nodes: list[int], nnodes: int, addr: str, port: int, timeout: float) -> str:
    one = len(nodes) == 1
    names = f"node {nodes[0]}" if one else f"nodes {', '.join(map(str, nodes[:-1]))} and {nodes[-1]}"
    return (
        f"{names} of {nnodes} {'has' if one else 'have'} not come to {addr}:{port} within {timeout} s; start the same "
        f"launcher there with NNODES={nnodes} NODE_RANK={nodes[0] if one else '(its own)'} MASTER_ADDR={addr} "
        f"MASTER_PORT={port}, and check that {addr} is node 0 and that a firewall lets them reach that port."
    )


def _greet(nnodes: int, node_rank: int, addr: str, port: int, timeout: float) -> None:
    """Run on the other nodes: connect to node 0, which may start later, and wait for its answer."""
    print(f"node {node_rank} of {nnodes}: looking for node 0 at {addr}:{port}, at most {timeout} s", flush=True)
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((addr, port), timeout=CONNECT_TIMEOUT) as connection:
                _send(connection, {"node": node_rank, "nodes": nnodes, "host": socket.gethostname()})
                answer = _read(connection, timeout + ANSWER_TIMEOUT)  # node 0 may have started later
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        else:
            if isinstance(answer, dict) and "problem" in answer:
                if answer["problem"]:
                    raise UserError(answer["problem"])
                return
            reason = "another program listens there"
        if time.monotonic() > deadline:
            raise UserError(
                f"node 0 cannot be reached at {addr}:{port} within {timeout} s ({reason}); start the same launcher "
                "there with NODE_RANK=0, and check MASTER_ADDR and MASTER_PORT here and that a firewall lets this "
                "machine reach that port."
            )
        time.sleep(RETRY)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # the other side is gone, which the next read finds out


def _read(connection: socket.socket, timeout: float) -> Any:
    """Read one line of JSON; None for anything else."""
    connection.settimeout(timeout)
    try:
        with connection.makefile("rb") as stream:
            return json.loads(stream.readline(LONGEST_MESSAGE))
    except (OSError, ValueError):
        return None


def _hung_up(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1)  # a node that waits sends nothing more
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(CONNECT_TIMEOUT)


# ----------------------------------------------------------------------------------------------------------------------
# While training


def watch(patience: float = 40, arrival: float = 300) -> "Watch":
    """Watch the other nodes of a torch.distributed.run, and end this process with exit code 3 when one is gone.

    Call it on every rank; it starts on the first rank of each node, if there are several nodes. Nothing else interrupts
    a collective that waits for a node that is gone.

    Args:
        patience: seconds without a sign of life of a node, or of the store on node 0, that end the training. A network
            that fails for less than half of that is survived, as TCP repeats lost packets at growing intervals.
        arrival: the same for a node that has not come here yet: it may still load libraries from a slow disk.
    Returns:
        A `Watch`; its close() tells the others that this node has finished. `with watch():` closes it unless an error
        is raised: the others must not wait for a node that failed.
    """
    watched = Watch(console.node_rank(), console.node_count(), patience, arrival)
    if watched.nodes > 1 and console.local_rank() == 0:
        watched.start()
    return watched


class Watch:
    """Signs of life of all nodes, in the store that torch.distributed.run keeps on node 0 at MASTER_ADDR:MASTER_PORT.

    One thread writes and reads them, and may block when the link is cut; another thread checks their age.

    Args:
        node, nodes: number of this node, and how many there are.
        patience, arrival: see `watch`.
    """

    def __init__(self, node: int, nodes: int, patience: float, arrival: float):
        self.node, self.nodes, self.patience, self.arrival = node, nodes, patience, arrival
        self.interval = min(3, patience / 8)  # seconds between two signs of life
        self.clock = 0.0  # seconds that this process has run, without those in which it was stopped
        self.reached = 0.0  # clock when the store last answered
        self.heard = dict.fromkeys(set(range(nodes)) - {node}, 0.0)  # node: clock of its last new sign
        self.signs: dict[int, str] = {}  # node: its last sign
        self.hosts: dict[int, str] = {}
        self.finished: set[int] = set()
        self.ending, self.goodbye = threading.Event(), False
        self.beats = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Start both threads."""
        self.beats.start()
        threading.Thread(target=self._check, daemon=True).start()
        atexit.register(self._end)  # a thread that is inside torch would crash the interpreter's teardown

    def close(self) -> None:
        """Tell the other nodes that this one has finished, which takes at most some seconds."""
        self.goodbye = True
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:
            self._end()
        else:
            self.close()

    def _end(self) -> None:
        self.ending.set()
        if self.beats.is_alive():
            self.beats.join(timeout=5)

    def _beat(self) -> None:
        """Write this node's sign of life and read those of the others, until the end."""
        store, count, ending = None, 0, False
        while not ending:
            ending = self.ending.wait(self.interval if count else 0)
            count += 1
            try:
                store = store or self._store()
                sign = "end" if ending and self.goodbye else count
                store.set(str(self.node), f"{sign} {socket.gethostname()}")
                for other in set(self.heard) - self.finished:
                    if store.check([str(other)]):
                        self._hear(other, *store.get(str(other)).decode().split(" ", 1))
                self.reached = self.clock
            except Exception:  # whatever torch raises, the store did not answer
                store = None

    def _store(self) -> Any:
        from datetime import timedelta

        from torch.distributed import PrefixStore, TCPStore

        timeout = timedelta(seconds=CONNECT_TIMEOUT)
        client = TCPStore(*console.store_address(), is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore(f"nodes/{console.restart_count()}", client)

    def _hear(self, other: int, sign: str, host: str) -> None:
        self.hosts[other] = host
        if sign == "end":
            self.finished.add(other)
        elif sign != self.signs.get(other):
            self.signs[other], self.heard[other] = sign, self.clock

    def _check(self) -> None:
        """End the process when the last sign of another node is too old."""
        before = time.monotonic()
        while not self.ending.wait(self.interval / 2):
            now = time.monotonic()
            self.clock += min(now - before, 2 * self.interval)
            before = now
            if 0 in self.finished and self.clock - self.reached > 4 * self.interval:
                continue  # node 0 has finished, and the store with it
            ages = {other: self.clock - heard for other, heard in self.heard.items() if other not in self.finished}
            limits = {other: self.patience if other in self.signs else self.arrival for other in ages}
            if any(ages[other] > limits[other] for other in ages):
                # Name others of about the same age as well: this node may be the one that is cut off.
                late = [other for other in ages if ages[other] > limits[other] - 2 * self.interval]
                self._stop(late, min(ages[other] for other in late))

    def _stop(self, late: list[int], age: float) -> None:
        names = [f"{other} ({self.hosts[other]})" if other in self.hosts else str(other) for other in late]
        text = f"nodes {', '.join(names[:-1])} and {names[-1]} have" if names[1:] else f"node {names[0]} has"
        console.write_line(
            f"error: {text} not been heard of for {age:.0f} s, so training stops here on node {self.node} of "
            f"{self.nodes}; the newest complete checkpoint stays: start again on all nodes with "
            "--resume_from_checkpoint auto."
        )
        os._exit(GONE)
