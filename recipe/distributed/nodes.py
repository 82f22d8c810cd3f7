"""Several machines that train together: they meet before the start, and each notices when another one is gone.

    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 python nodes.py    # on each machine with its own rank
    python nodes.py --standalone --nproc_per_node 2 finetune.py ...    # torch.distributed.run with finetune's exit code

A node is one machine. `meet` comes before torch.distributed.run, which waits ten minutes for a node that is missing and
does not say which. `watch` runs inside the training, where a collective waits half an hour for a node that is gone.
"""

import atexit
import errno
import json
import os
import socket
import sys
import threading
import time

from recipe import console
from recipe.console import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Before the start


def meet(nnodes, node_rank, addr, port, timeout=60):
    """Return on all nodes when all of them have come; node 0 listens at addr:port, the others connect to it.

    Args:
        timeout: seconds that each node waits, from its own start.
    Raises:
        UserError: a node has not come, cannot reach node 0, or was started with other numbers; on all that came.
    """
    if node_rank == 0:
        _receive(nnodes, addr, port, timeout)
    else:
        _greet(nnodes, node_rank, addr, port, timeout)


def _receive(nnodes, addr, port, timeout):
    """Node 0: wait for all, then give each the same answer, the problem there is or none."""
    print(f"node 0 of {nnodes}: waiting for the others at {addr}:{port}, at most {timeout} s", flush=True)
    deadline = time.monotonic() + timeout
    came, problem = [], "node 0 was stopped before all nodes had come."  # came: (node, host, connection)
    try:
        with _listening(port) as server:
            while len(came) < nnodes - 1:
                _accept(server, nnodes, came)
                came[:] = [entry for entry in came if not _hung_up(entry[2])]  # stopped there, and maybe started again
                _compare(came, nnodes)
                if time.monotonic() > deadline:
                    nodes = {node for node, _, _ in came}
                    raise UserError(_missing(sorted({*range(nnodes)} - nodes - {0}), nnodes, addr, port, timeout))
        problem = None
        print(f"all {nnodes} nodes have come", flush=True)
    except UserError as error:
        problem = str(error)
        raise
    finally:
        for _, _, connection in came:
            with connection:
                _send(connection, {"problem": problem})


def _listening(port):
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(_no_port(port, error)) from None  # others: IPv6 is switched off
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(_no_port(port, error)) from None


def _no_port(port, error):
    found = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({os.strerror(error.errno)})"
    return f"port {port} {found} on this machine, node 0; set another MASTER_PORT, the same on all nodes."


def _accept(server, nnodes, came):
    """Take up the next node into `came`; whatever else connects, such as a port scanner, is left out."""
    server.settimeout(0.5)
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return
    greeting = _read(connection, 5)
    if isinstance(greeting, dict) and {"node", "nodes", "host"} <= set(greeting):
        came.append((greeting["node"], greeting["host"], connection))
        if greeting["nodes"] != nnodes:
            raise UserError(
                f"node {greeting['node']} ({greeting['host']}) was started with NNODES={greeting['nodes']}, node 0 "
                f"({socket.gethostname()}) with NNODES={nnodes}; set the same NNODES on all nodes."
            )
    else:
        connection.close()


def _compare(came, nnodes):
    hosts = {}
    for node, host, _ in came:
        if node in hosts:
            raise UserError(
                f"two machines came as node {node} of {nnodes} ({hosts[node]} and {host}); set a NODE_RANK of its own "
                f"on each, 0 to {nnodes - 1}."
            )
        hosts[node] = host


def _missing(nodes, nnodes, addr, port, timeout):
    one = len(nodes) == 1
    names = f"node {nodes[0]}" if one else f"nodes {', '.join(map(str, nodes[:-1]))} and {nodes[-1]}"
    return (
        f"{names} of {nnodes} {'has' if one else 'have'} not come to {addr}:{port} within {timeout} s; start the same "
        f"launcher there with NNODES={nnodes} NODE_RANK={nodes[0] if one else '(its own)'} MASTER_ADDR={addr} "
        f"MASTER_PORT={port}, and check that {addr} is node 0 and that a firewall lets them reach that port."
    )


def _greet(nnodes, node_rank, addr, port, timeout):
    """Another node: connect to node 0, which may start later, and wait for its answer."""
    print(f"node {node_rank} of {nnodes}: looking for node 0 at {addr}:{port}, at most {timeout} s", flush=True)
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((addr, port), timeout=5) as connection:
                _send(connection, {"node": node_rank, "nodes": nnodes, "host": socket.gethostname()})
                answer = _read(connection, timeout + 10)  # node 0 may have started later, and knows when to give up
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        else:
            if isinstance(answer, dict) and "problem" in answer:
                if answer["problem"]:
                    raise UserError(answer["problem"])
                return
            reason = "what listens there does not answer as node 0 does"
        if time.monotonic() > deadline:
            raise UserError(
                f"node 0 cannot be reached at {addr}:{port} within {timeout} s ({reason}); start the same launcher "
                "there with NODE_RANK=0, and check MASTER_ADDR and MASTER_PORT here and that a firewall lets this "
                "machine reach that port."
            )
        time.sleep(0.5)


def _send(connection, message):
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # gone: whoever reads finds out


def _read(connection, timeout):
    """One line of JSON, or None for anything else."""
    connection.settimeout(timeout)
    try:
        with connection.makefile("rb") as stream:
            return json.loads(stream.readline(10_000))
    except (OSError, ValueError):
        return None


def _hung_up(connection):
    connection.setblocking(False)
    try:
        return not connection.recv(1)  # nothing more is sent by a node that waits
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5)


def main():
    if sys.argv[1:]:
        torchrun(sys.argv[1:])
    try:
        names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise UserError(f"{missing[0]} is not set; see --help of the launchers, such as finetune_lora_ds.sh.")
        nnodes, node_rank, addr, port = (os.environ[name] for name in names)
        meet(int(nnodes), int(node_rank), addr, int(port))
    except UserError as error:
        console.fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def torchrun(argv):
    """Run torch.distributed.run and end with the exit code of the process that failed first; its own is always 1."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise SystemExit(code if code > 0 else 128 - code) from None  # a signal, as shells have it
    raise SystemExit(0)


# ----------------------------------------------------------------------------------------------------------------------
# While training


def watch(patience=40, arrival=300):
    """Watch the other nodes of a torch.distributed.run, and end this process with exit code 3 when one is gone.

    To be called on every rank when torch.distributed is initialised; it does nothing but on the first rank of each of
    several nodes. A collective that waits for a node that is gone cannot be interrupted in any other way.
    Args:
        patience: seconds without a sign of life of a node, or of the store on node 0, that end the training. A network
            that fails for less than half of that is survived: TCP tries again ever more rarely.
        arrival: the same for a node that has not come here yet: it may still load libraries from a slow disk.
    Returns:
        A `Watch`; its close() tells the others that this node has finished. `with watch():` closes it unless an error
        is raised: the others must not wait for a node that failed.
    """
    each = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    nodes = int(os.environ["WORLD_SIZE"]) // each if each else 1
    node = int(os.environ.get("GROUP_RANK", int(os.environ.get("RANK", 0)) // each if each else 0))
    watched = Watch(node, nodes, patience, arrival)
    if nodes > 1 and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        watched.start()
    return watched


class Watch:
    """Signs of life of all nodes, in the store that torch.distributed.run keeps on node 0 at MASTER_ADDR:MASTER_PORT.

    One thread writes and reads them and may be blocked when the link is cut; another one looks at the clock.
    """

    def __init__(self, node, nodes, patience, arrival):
        self.node, self.nodes, self.patience, self.arrival = node, nodes, patience, arrival
        self.interval = min(3, patience / 8)  # seconds between two signs
        self.clock = 0.0  # seconds that this process was running: a stopped one has no right to complain
        self.reached = 0.0  # clock when the store last answered
        self.heard = dict.fromkeys(set(range(nodes)) - {node}, 0.0)  # node: clock of its last new sign
        self.signs, self.hosts, self.finished = {}, {}, set()
        self.ending, self.goodbye = threading.Event(), False
        self.beats = threading.Thread(target=self._beat, daemon=True)

    def start(self):
        self.beats.start()
        threading.Thread(target=self._look, daemon=True).start()
        atexit.register(self._end)  # a thread inside of torch when the interpreter goes down would crash it

    def close(self):
        """Tell the other nodes that this one has finished, which takes at most some seconds."""
        self.goodbye = True
        self._end()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._end() if kind else self.close()

    def _end(self):
        self.ending.set()
        if self.beats.is_alive():
            self.beats.join(timeout=5)

    def _beat(self):
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
            except Exception:  # whatever torch raises: no answer is no sign of life
                store = None

    def _store(self):
        from datetime import timedelta

        from torch.distributed import PrefixStore, TCPStore

        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return PrefixStore(f"nodes/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", client)

    def _hear(self, other, sign, host):
        self.hosts[other] = host
        if sign == "end":
            self.finished.add(other)
        elif sign != self.signs.get(other):
            self.signs[other], self.heard[other] = sign, self.clock

    def _look(self):
        before = time.monotonic()
        while not self.ending.wait(self.interval / 2):
            now = time.monotonic()
            self.clock += min(now - before, 2 * self.interval)
            before = now
            if 0 in self.finished and self.clock - self.reached > 4 * self.interval:
                continue  # the store ended with node 0, as it may
            ages = {other: self.clock - heard for other, heard in self.heard.items() if other not in self.finished}
            limits = {other: self.patience if other in self.signs else self.arrival for other in ages}
            if any(ages[other] > limits[other] for other in ages):
                # Others heard of about as long ago are told, too: this node may be the one that is cut off.
                late = [other for other in ages if ages[other] > limits[other] - 2 * self.interval]
                self._stop(late, min(ages[other] for other in late))

    def _stop(self, late, age):
        names = [f"{other} ({self.hosts[other]})" if other in self.hosts else str(other) for other in late]
        text = f"nodes {', '.join(names[:-1])} and {names[-1]} have" if names[1:] else f"node {names[0]} has"
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # which may wait for a lock
        flush.start()
        flush.join(1)
        line = (  # on a line of its own, below a progress bar
            f"\nerror: {text} not been heard of for {age:.0f} s, so training stops here on node {self.node} of "
            f"{self.nodes}; the newest complete checkpoint stays: start again on all nodes with "
            "--resume_from_checkpoint auto.\n"
        )
        os.write(2, line.encode())
        os._exit(3)


if __name__ == "__main__":
    main()
