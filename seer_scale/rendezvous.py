"""How the ranks of one start meet: rank 0 serves a store on a free port and publishes where in a file that all of them
see.

Whoever reads an address that is not of this start (a file left behind, a rank 0 that is gone) reads it again. While
ranks wait for each other they say for whom, and a stop signal ends the wait. What keeps one rank from beginning ends
all."""

from __future__ import annotations

import ipaddress
import json
import os
import pickle
import random
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from seer_scale.errors import NOTHING, Problem, RankError, StartStopped, UserError
from seer_scale.files import to_json, write_whole
from seer_scale.rank_info import RankInfo

TELL_S = 30.0
"""Seconds after which waiting is told, and told again."""
PROBE_S = 3.0
"""Seconds in which an address answers, if it is one of rank 0's."""


def meet(
    published: Path, info: RankInfo, *, timeout_s: float, later: timedelta,
    asked_to_stop: Callable[[], str | None] = lambda: None, problem: UserError | None = None, device: str = "cpu",
) -> dist.TCPStore:  # fmt: skip
    """A store that all ranks of this start have joined; returns when the last has. Collective.

    later: how long a question to the store may wait from then on; NCCL asks one as each communicator is made.
    asked_to_stop: the name of a signal that ends the wait. problem: what keeps this rank from beginning; the first of
    any rank (on rank 0 its own) is raised on all, as soon as they are there. device: the kind this rank would compute
    on, which must be that of all. Raises StartStopped for a signal, and RankError where the others do not come within
    timeout_s.
    """
    wait = _Wait(info, timeout_s, asked_to_stop)
    while True:
        store, reached = _serve(published, info) if info.rank == 0 else _join(published, info, wait)
        try:
            if store.add(f"rank/{info.rank}", 1) > 1:
                wait.pause(lambda: f"another process has joined as rank {info.rank} already, in {published.parent}")
                continue
            if reached:
                store.set("reached", reached)
            own = problem or _device_problem(info, device, store.compare_set("device", "", device).decode())
            if own:
                # torch's stub says str, and bytes are taken as they are
                store.compare_set("problem", "", pickle.dumps(own))  # type: ignore[arg-type]
            if store.add("arrived", 1) == info.size or own:
                store.set("go", "")
            while not store.check(["go"]):
                wait.pause(lambda: _missing(store, info))  # noqa: B023
            first = pickle.loads(store.get("problem")) if store.check(["problem"]) else None
            if not reached and store.check(["reached"]):
                reached = store.get("reached").decode()
        except dist.DistError:  # of an earlier start, which has ended now
            wait.pause(lambda: "rank 0 has ended")
            continue
        if first:
            _tell_all(store, info.size, asked_to_stop)
        if info.rank == 0:
            published.unlink(missing_ok=True)  # all have read it, and a later start must not
        if first:
            raise problem if problem and info.rank == 0 else first
        if info.local_size < info.size and reached:
            _choose_interface(reached, mine=info.rank == 0)
        store.set_timeout(later)
        return store


def _device_problem(info: RankInfo, own: str, first: str) -> UserError | None:
    if own == first:
        return None
    rule = f"would compute on {own}, but a rank before it on {first}"
    fix = "see whether each machine has its GPUs (nvidia-smi), or give parallel.device cpu"
    problem = UserError(Problem(f"Rank {info.rank} on {socket.gethostname()}", NOTHING, rule, fix))
    problem.retryable = True  # on other machines
    return problem


def _tell_all(store: dist.TCPStore, size: int, asked_to_stop: Callable[[], str | None]) -> None:
    """Stays until every rank knows the problem, for a while: rank 0 serves it, and launchers end all ranks when one
    ends."""
    end = time.monotonic() + TELL_S
    with suppress(dist.DistError):  # rank 0 has seen that all know
        store.add("told", 1)
        while store.add("told", 0) < size and time.monotonic() < end and not asked_to_stop():
            time.sleep(0.1)


class _Wait:
    """Pauses, ever longer, that end where a stop is asked for or the time is over; what is waited for is told now and
    then."""

    def __init__(self, info: RankInfo, timeout_s: float, asked_to_stop: Callable[[], str | None]):
        self._info, self._timeout_s, self._asked_to_stop = info, timeout_s, asked_to_stop
        self._began = self._told_at = time.monotonic()
        self._pause_s = 0.02

    def pause(self, what: Callable[[], str]) -> None:
        if reason := self._asked_to_stop():
            raise StartStopped(
                f"Stopped by {reason} while ranks waited for each other, so nothing was begun. Start it again "
                "and it goes on."
            )
        now, info = time.monotonic(), self._info
        over = now - self._began > self._timeout_s
        # one of a machine: what is waited for may be a question to rank 0
        if over or now - self._told_at > TELL_S and info.local_rank == 0:
            self._told_at = now
            fix = f"start all ranks at about the same time, or with {info.source} 1 for this one alone"
            rule = f"has waited {now - self._began:.0f} s for the others: {what()}"
            key = f"Rank {info.rank} of {info.size} ({info.source} is {info.size})"
            if over:
                raise RankError(Problem(key, NOTHING, rule, fix))
            print(Problem(key, NOTHING, rule), file=sys.stderr, flush=True)
        time.sleep(self._pause_s * random.uniform(0.5, 1.0))  # not all of them at once
        self._pause_s = min(1.0, 1.2 * self._pause_s)


def _missing(store: dist.TCPStore, info: RankInfo) -> str:
    """How many are there; rank 0, which the answers cost nothing, says who is not."""
    there = store.add("arrived", 0)
    if info.rank:
        return f"{there} of {info.size} are there"
    absent = [str(r) for r in range(info.size) if not store.check([f"rank/{r}"])]
    more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
    return f"{there} of {info.size} are there, not yet {', '.join(absent[:8])}{more}"


def _serve(published: Path, info: RankInfo) -> tuple[dist.TCPStore, str]:
    token = secrets.token_hex(8)
    store = dist.TCPStore("0.0.0.0", 0, info.size, is_master=True, wait_for_workers=False)
    store.set(f"start/{token}", "")
    where = {"hosts": _own_addresses(info), "port": store.port, "size": info.size, "token": token}
    try:
        write_whole(published, to_json(where))
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise UserError(Problem(str(published.parent), NOTHING, rule, "choose another run.dir")) from error
    return store, ""


def _join(published: Path, info: RankInfo, wait: _Wait) -> tuple[dist.TCPStore, str]:
    """The store that rank 0 serves, and the address at which it was reached."""
    while True:
        try:
            where = json.loads(published.read_text())
            size, hosts, port, token = where["size"], where["hosts"], where["port"], where["token"]
        except (OSError, ValueError, LookupError, TypeError):  # not there yet, or of an earlier start
            wait.pause(
                lambda: (
                    f"rank 0 has not published its address in {published} (is {published.parent} on a file "
                    "system that all nodes share?)"
                )
            )
            continue
        if size != info.size:
            wait.pause(lambda: f"rank 0 is one of {size} ranks")  # noqa: B023
            continue
        for host in hosts:
            with suppress(OSError, UnicodeError, dist.DistError):
                with socket.create_connection((host, port), PROBE_S) as probe:
                    reached = probe.getpeername()[0]
                store = dist.TCPStore(
                    host, port, size, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PROBE_S)
                )
                if store.check([f"start/{token}"]):
                    return store, reached
        wait.pause(lambda: f"rank 0 does not answer at {', '.join(hosts)}, port {port}")  # noqa: B023


def _own_addresses(info: RankInfo) -> list[str]:
    """This machine's names and addresses, the likeliest to be reached from the other ranks' machines first."""
    found = []
    if info.local_size < info.size:
        found.append(socket.gethostname())
        with suppress(OSError):
            found += _addresses(found[0])
        for family, anywhere in (
            (socket.AF_INET, "192.0.2.1"),
            (socket.AF_INET6, "2001:db8::1"),
        ):  # documentation's: no packet is sent
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((anywhere, 9))
                found.append(probe.getsockname()[0])
    return [*dict.fromkeys(a for a in found if not _is_loopback(a)), "127.0.0.1"]


def _addresses(host: str) -> list[str]:
    """Those that a name leads to. Raises OSError."""
    return [str(a[4][0]) for a in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def _is_loopback(address: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return False


def _choose_interface(rank_0: str, *, mine: bool) -> None:
    """gloo listens where the machine's own name leads to, which on a machine without a name of its own is the loopback:
    then on the network by which rank 0 is reached (mine: this is rank 0)."""
    if os.environ.get("GLOO_SOCKET_IFNAME") or _is_loopback(rank_0):
        return
    with suppress(OSError):
        if not _is_loopback(_addresses(socket.gethostname())[0]):
            return
    own = rank_0
    if not mine:
        family = socket.AF_INET6 if ":" in rank_0 else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((rank_0, 9))
            own = probe.getsockname()[0]
    if name := interface_of(own):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where it cannot be told."""
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR of Linux
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        wanted = socket.inet_aton(address)
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(any_socket, get_address, name.encode().ljust(256, b"\0"))
                if answer[20:24] == wanted:
                    return name
    return None
