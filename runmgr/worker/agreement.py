"""Do it on one rank and give every rank the result, or the same error. Nobody hangs.

How the ranks of a launch find each other, in this order:

==============================  ===============================  ==========================================
situation                       rank and world size from         exchange over
==============================  ===============================  ==========================================
process group initialised       the group                        the group's own store
before `init_process_group`,    the environment                  the torchrun agent's store
  under torchrun
several ranks, neither of both  -                                AgreementError that says what to do
alone                           -                                nothing
==============================  ===============================  ==========================================

Everything goes over a key-value store on the CPU, so that no device is needed, no collective can hang, and a rank that
does not come can be named. The store outlives restarts and so do its keys: the ranks first agree on a session, by a
handshake in which each believes only an answer to its own fresh nonce (see `_join`), and all later keys carry its name.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch.distributed as dist

from runmgr import ranks as environment
from runmgr.errors import AgreementError, RankFailed, RankTimeout, RunError, echo
from runmgr.worker import asking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.distributed import Store  # type: ignore[attr-defined]

    from runmgr.ranks import Ranks

_BEAT_S = 5.0
_GRACE_S = 2 * _BEAT_S
_SILENCE_S = 60.0
_CONNECT_S = 10.0
_EACH_S = 0.0005
_HELLO_AGAIN_S = 0.02
_LINGER_S = 3.0
_LAUNCH_KEY = "runmgr/launch"


def current_ranks() -> Ranks:
    """Return this process's place: an initialised process group knows best, else the environment says."""
    found = environment.from_environment()
    if dist.is_available() and dist.is_initialized():
        return found._replace(rank=dist.get_rank(), world_size=dist.get_world_size(), source="the process group")
    return found


def connect(timeout_s: float) -> Agreement:
    """Join the other ranks of this launch. Every rank; raises RankTimeout that names who is missing."""
    global _shared  # noqa: PLW0603  # averages work with and without a run, so this belongs to the process
    _shared = _connect(timeout_s)
    return _shared


def shared(timeout_s: float = 300.0) -> Agreement:
    """Return the agreement that the open run uses, or join now: also when there are others only since then. Every rank."""
    if _shared is not None and _shared.ranks[:2] == current_ranks()[:2]:
        return _shared
    return connect(timeout_s)


def forget(agreement: Agreement) -> None:
    """Let the next `shared()` join anew: the run that used this agreement has ended."""
    global _shared  # noqa: PLW0603  # as above
    agreement.linger()
    if _shared is agreement:
        _shared = None


def _connect(timeout_s: float) -> Agreement:
    ranks = current_ranks()
    if ranks.world_size == 1:
        return Agreement(ranks, None, timeout_s)
    store = _group_store() or _agent_store(timeout_s)
    if store is None:
        raise AgreementError(
            f"{ranks.source} say that {ranks.world_size} ranks run, but rank {ranks.rank} on {ranks.host} has no way "
            f"to speak with the others. Call torch.distributed.init_process_group() before runmgr.start_run(), or start "
            f"the script with torchrun; if this process is alone, unset the variables."
        )
    with _store_errors(ranks):
        return Agreement(ranks, store, timeout_s)


def launch_key(timeout_s: float, remembered: str | None = None) -> str | None:
    """Return what names this launch in each of its restarts, or None when nothing does. Rank 0 only.

    The user's RUNMGR_LAUNCH_ID, else a nonce that the first attempt left in the torchrun agent's store: unlike
    `--rdzv-id` it cannot be the same for two launches. A store that has none is given what the agents `remembered`:
    theirs was lost, together with the agent that had hosted it.
    """
    if given := environment.launch_id():
        return f"id-{given}"
    store = _agent_store(timeout_s)
    if store is None:
        return None
    return str(store.compare_set(_LAUNCH_KEY, "", remembered or f"torchrun-{secrets.token_hex(8)}").decode())


def _group_store() -> Store | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001  # no public way to the store all ranks share


def _agent_store(timeout_s: float) -> Store | None:
    address = environment.agent_store_address()
    if address is None:
        return None
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = _agent_clients.get(address)  # torch looks up names when it connects, which may take seconds
    if store is None:
        host, port = address
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=max(timeout_s, _CONNECT_S)))
        _agent_clients[address] = store
    return store


_shared: Agreement | None = None
_agent_clients: WeakValueDictionary[tuple[str, int], Store] = WeakValueDictionary()


class Agreement:
    """The ranks of one launch, able to come to one answer. Its calls are collective: every rank, in the same order."""

    def __init__(self, ranks: Ranks, store: Store | None, timeout_s: float) -> None:
        self.ranks = ranks
        self.timeout_s = timeout_s
        self._store = store
        self._session = f"runmgr/{secrets.token_hex(8)}"
        self._welcome: _Welcome | None = None
        if store is not None and ranks.is_main:
            self._welcome = _Welcome(store, self._session, ranks.world_size)
        elif store is not None:
            self._session = _join(store, ranks, timeout_s)
        self._count = 0
        self._lingered = 0

    def agree(
        self,
        what: str,
        decide: Callable[[list[Any]], Any],
        contribute: Callable[[], Any] = lambda: None,
    ) -> Any:
        """Run `contribute` on every rank, `decide` on rank 0 with all the answers, and return its result on every rank.

        Answers and result are plain data (JSON). Whatever raises, on whichever rank, raises the same error everywhere;
        `what` completes "rank 2 on host could not …". A rank that does not come within `timeout_s` is named.
        """
        own, failure = self._attempt(what, contribute)
        if self._store is None:
            if failure is None:
                result, failure = self._attempt(what, lambda: decide([own]))
            if failure is not None:
                raise failure
            return result
        with _store_errors(self.ranks):
            self._count += 1
            if self.ranks.rank == 0:
                return self._lead(what, own, failure, decide)
            return self._follow(what, own, failure)

    def post(self, key: str, text: str) -> None:
        """Put down `text` for all ranks. Not collective, any thread; there must be several ranks."""
        assert self._store is not None
        with _store_errors(self.ranks):
            self._store.set(f"{self._session}/{key}", text)

    def look(self, keys: list[str]) -> list[str] | None:
        """Return what lies under the keys, or None while one is missing. Not collective, any thread."""
        assert self._store is not None
        with _store_errors(self.ranks):
            full = [f"{self._session}/{key}" for key in keys]
            return [value.decode() for value in asking.get_all(self._store, full)] if self._store.check(full) else None

    def _attempt(self, what: str, action: Callable[[], Any]) -> tuple[Any, RunError | None]:
        try:
            return json.loads(json.dumps(action())), None
        except RunError as error:
            return None, error
        except Exception as error:  # noqa: BLE001  # whatever it is, the other ranks must not wait for it
            text = str(error) or repr(error)
            failed = RankFailed(
                f"rank {self.ranks.rank} on {self.ranks.host} could not {what}: {type(error).__name__}: {text}",
                rank=self.ranks.rank,
                host=self.ranks.host,
                what=what,
                error_type=type(error).__name__,
                error=text,
            )
            failed.__cause__ = error
            return None, failed

    def _key(self, name: str, count: int | None = None) -> str:
        return f"{self._session}/{self._count if count is None else count}/{name}"

    def _lead(self, what: str, own: Any, failure: RunError | None, decide: Callable[[list[Any]], Any]) -> Any:
        assert self._store is not None
        result: Any = None
        interrupt: BaseException | None = None
        try:
            with self._beating(self._count):
                answers = self._collect(what)
                failure = failure or next(filter(None, map(_failure_in, answers)), None)
                if failure is None:
                    values = [own, *(answer["value"] for answer in answers)]
                    result, failure = self._attempt(what, lambda: decide(values))
        except RankTimeout as error:
            failure = failure or error  # what failed here may be what the others wait for
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
            failure = RankFailed(
                f"rank 0 on {self.ranks.host} was interrupted and did not {what}",
                rank=0, host=self.ranks.host, what=what, error_type=type(error).__name__, error=str(error),
            )  # fmt: skip
        self._store.set(self._key("out"), json.dumps(_packed(result, failure)))
        if self._count > 1:
            self._store.delete_key(self._key("out", self._count - 1))
        if interrupt is not None:
            raise interrupt
        if failure is not None:
            self.linger(failure.ranks if isinstance(failure, RankTimeout) else ())
            raise failure
        return result

    def _collect(self, what: str) -> list[dict[str, Any]]:
        """Return what the other ranks put down, in rank order, once all have."""
        assert self._store is not None
        keys = [self._key(f"in/{rank}") for rank in range(1, self.ranks.world_size)]
        welcome = self._welcome.answer if self._welcome is not None and self._count == 1 else lambda: None
        if not asking.wait(self._store, keys, self.timeout_s, self.ranks.world_size, welcome):
            missing = [rank for rank, key in enumerate(keys, 1) if not self._store.check([key])]
            raise _missing(missing, what, self.timeout_s)
        return [json.loads(value) for value in asking.get_all(self._store, keys)]

    def _follow(self, what: str, own: Any, failure: RunError | None) -> Any:
        assert self._store is not None
        self._store.set(self._key(f"in/{self.ranks.rank}"), json.dumps(_packed(own, failure)))
        if self._count > 1:
            self._store.delete_key(self._key(f"in/{self.ranks.rank}", self._count - 1))
        out = self._key("out")
        arrived = asking.wait(self._store, [out], self.timeout_s + _GRACE_S, self.ranks.world_size)
        beat = None
        while not arrived:  # rank 0 may be at work on it for longer than others may take to come
            latest = self._store.get(self._key("beat")) if self._store.check([self._key("beat")]) else None
            if latest == beat:
                raise _missing([0], what, self.timeout_s)
            beat = latest
            arrived = asking.wait(self._store, [out], _SILENCE_S, self.ranks.world_size)
        answer = json.loads(self._store.get(out))
        self._store.set(f"{self._session}/read/{self.ranks.rank}", str(self._count))
        if error := _failure_in(answer):
            raise error from failure
        return answer["value"]

    def linger(self, absent: Iterable[int] = ()) -> None:
        """Rank 0 lets the others read its last answer before it may exit: the store may be its own. Waits 3 s at most."""
        if self._store is not None and self.ranks.rank == 0 and self._lingered < self._count:
            self._lingered = self._count
            _linger(self._store, self._session, self._count, set(range(1, self.ranks.world_size)) - set(absent))

    @contextmanager
    def working(self) -> Iterator[None]:
        """Let rank 0 work before it comes to the next `agree`, where the others may wait already. Rank 0 only."""
        with self._beating(self._count + 1) if self._store is not None else nullcontext():
            yield

    @contextmanager
    def _beating(self, count: int) -> Iterator[None]:
        """Show the others that rank 0 has come and is alive while it waits or works."""
        assert self._store is not None
        store, key, ended = self._store, self._key("beat", count), threading.Event()

        def beat() -> None:
            beats = 0
            while not ended.wait(_BEAT_S):
                beats += 1
                store.set(key, str(beats))

        thread = threading.Thread(target=beat, name="runmgr-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class _Welcome:
    """Rank 0's part of a session's beginning: what an earlier attempt left in the store is never believed.

    Each rank says hello with a new nonce, believes only an answer under that nonce, and comes to the first exchange of
    the session that the answer names. Rank 0 answers each hello anew whenever it has changed: what it saw first may be
    a dead rank's.
    """

    def __init__(self, store: Store, session: str, world_size: int) -> None:
        self._store = store
        self._session = session
        self._hellos = [f"runmgr/hello/{rank}" for rank in range(1, world_size)]
        self._answered: set[bytes] = set()
        self._asked = time.monotonic()

    def answer(self) -> None:
        """Answer those who are there: by one question once all are, else each by itself, which takes longer."""
        said = self._hellos
        asked_s = time.monotonic() - self._asked
        if len(self._answered) >= len(said):
            if asked_s < _HELLO_AGAIN_S:
                return
        elif not self._store.check(said):
            if asked_s < _EACH_S * len(said):
                return
            said = [key for key in said if self._store.check([key])]
        self._asked = time.monotonic()
        nonces = [nonce for nonce in asking.get_all(self._store, said) if nonce not in self._answered]
        self._answered.update(nonces)
        asking.set_all(self._store, [f"runmgr/answer/{nonce.decode()}" for nonce in nonces], self._session)


def _join(store: Store, ranks: Ranks, timeout_s: float) -> str:
    """Say hello and return the session that rank 0 answers with."""
    own = secrets.token_hex(8)
    store.set(f"runmgr/hello/{ranks.rank}", own)
    if not asking.wait(store, [f"runmgr/answer/{own}"], timeout_s + _GRACE_S, ranks.world_size):
        raise _missing([0], "start a run", timeout_s)
    return str(store.get(f"runmgr/answer/{own}").decode())


def _linger(store: Store, session: str, count: int, ranks: Iterable[int]) -> None:
    """Wait a little until `ranks` have read answer `count`; whoever is gone or busy elsewhere is not waited for long."""
    keys = [f"{session}/read/{rank}" for rank in ranks]
    deadline = time.monotonic() + _LINGER_S
    with suppress(dist.DistError):  # the store is gone, and with it every reason to stay
        while time.monotonic() < deadline:
            if store.check(keys) and all(int(read) >= count for read in asking.get_all(store, keys)):
                return
            time.sleep(0.002)


def _packed(value: Any, failure: RunError | None) -> dict[str, Any]:
    if failure is None:
        return {"value": value}
    return {"error": [type(failure).__name__, failure.message, failure.fields]}


def _failure_in(answer: dict[str, Any]) -> RunError | None:
    return echo(*answer["error"]) if "error" in answer else None


def _missing(ranks: list[int], what: str, timeout_s: float) -> RankTimeout:
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return RankTimeout(
        f"{who} did not come to {what} within {timeout_s:g} s. Every rank must make this call, equally often; look at "
        f"what {who} did last, or raise timeout_s if it is only slow.",
        ranks=ranks,
        what=what,
        timeout_s=timeout_s,
    )


@contextmanager
def _store_errors(ranks: Ranks) -> Iterator[None]:
    """Translate the loss of the store, which is the loss of the launch."""
    try:
        yield
    except dist.DistError as error:
        raise AgreementError(
            f"rank {ranks.rank} on {ranks.host} lost the store that connects the ranks ({error}); the process that "
            f"hosted it, torchrun's agent or rank 0, has ended"
        ) from error
