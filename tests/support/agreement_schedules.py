"""Random schedules of moecomm.elastic.agreement: crashes while sending, false suspicions, partitions.

python tests/support/agreement_schedules.py 1000000
"""

from __future__ import annotations

import random
import sys

from moecomm.elastic import agreement
from moecomm.elastic.agreement import Agreement


class Found(AssertionError):
    """The violation in a schedule."""


def run(seed, machine=Agreement, minority=False):
    """Run one schedule; return the number of messages taken.

    Raises
    ------
    Found
    """
    rng = random.Random(seed)
    n = rng.randint(2, 5)
    everyone = range(n)
    split = rng.random() < 0.4  # live ranks may be out of reach
    crashes = {}  # number of the event -> a rank crashes there
    for _ in range(rng.randint(0 if split else 1, n - 1)):
        crashes[int(rng.random() ** 2 * 14 * n)] = True
    early = rng.random() < 0.5  # the report of a death may overtake messages sent before it
    ranks = [machine(r, n, ("report", r), minority=minority) for r in everyone]
    alive, suspected, begun = [True] * n, set(), [False] * n
    queues = {}  # (kind, from, to) -> entries in flight, in order; kinds: "message", "death", "loss", "begin"
    ready = []  # keys of nonempty queues
    cut = set()  # pairs that cannot exchange messages now
    healed = rng.random() < 0.5

    def put(key, what):
        queue = queues.get(key)
        if queue:
            queue.append(what)
        else:
            queues[key] = [what]
            ready.append(key)

    def send(r, mail):
        """Queue the messages of r; if a crash is due, only some of them."""
        nonlocal events
        events += 1
        if events in crashes and sum(alive) > 1:
            mail = mail[: rng.randint(0, len(mail))]
            crash(r)
        for to, message in mail:
            put(("message", r, to), message)

    def crash(r):
        alive[r] = False
        for to in everyone:
            if to != r and alive[to]:
                queue = queues.get(("message", r, to))
                if queue and rng.random() < 0.3:  # its host has died: unsent messages are lost
                    del queue[rng.randint(0, len(queue)) :]
                    if not queue:
                        ready.remove(("message", r, to))
                put(("death", r, to), True)

    events = -1
    for r in everyone:
        put(("begin", r, r), True)
    if split:
        side = [rng.random() < 0.5 for _ in everyone]
        at = rng.randint(0, 8 * n)
    taken = ticks = 0
    while True:
        if split and taken == at:
            pairs = [(a, b) for a in everyone for b in everyone if side[a] != side[b]]
            if rng.random() < 0.3:  # only one false suspicion
                pairs = rng.sample(pairs, min(1, len(pairs)))
            cut.update(pairs)
            for a, b in pairs:
                put(("loss", a, b), True)
                suspected.add(a)
                suspected.add(b)
            at = taken + rng.randint(1, 10 * n) if healed and cut and len(suspected) else -1
            healed, split = False, at >= 0
            side = [False] * n
        elif split and at < taken:
            cut.clear()
            split = False
        if rng.random() < 0.02:
            r = rng.randrange(n)
            if alive[r] and begun[r]:
                send(r, ranks[r].remind())
        choices = [k for k in ready if k[0] != "message" or (k[1], k[2]) not in cut] if cut else ready
        if choices:
            key = choices[int(rng.random() * len(choices))]
            kind, a, to = key
            if kind == "death" and not early and queues.get(("message", a, to)) and (a, to) not in cut:
                continue
            queue = queues[key]
            what = queue.pop(0)
            if not queue:
                ready.remove(key)
            if not alive[to]:
                continue
            if kind == "message":
                if not begun[to]:  # keep it until the receiver takes part
                    put(("begin", to, to), True) if ("begin", to, to) not in ready else None
                    queue.insert(0, what)
                    if len(queue) == 1:
                        ready.append(key)
                    continue
                mail = ranks[to].take(a, what)
            elif kind == "begin":
                if begun[to]:
                    continue
                begun[to], mail = True, ranks[to].start()
            else:
                mail = ranks[to].lose(a, kind == "death")
            taken += 1
            if taken > 1000:
                raise Found("endless messages")
            send(to, mail)
            continue
        waiting = [r for r in everyone if alive[r] and not ranks[r].done]
        if not waiting:
            break
        if not suspected:
            raise Found(f"ranks {waiting} wait forever although every death is known")
        ticks += 1
        if ticks > 8 * n * n:
            raise Found(f"ranks {waiting} do not finish")
        r = rng.choice(waiting)
        suspected.update(agreement.members(ranks[r].suspects()))
        suspected.add(r)
        send(r, ranks[r].late())
    check(ranks, alive, suspected, minority)
    return taken


def check(ranks, alive, suspected, minority):
    """Check the properties that hold at the end of every schedule."""
    verdicts = {r: ranks[r].verdict for r in range(len(ranks)) if alive[r] and ranks[r].verdict is not None}
    if not minority and len({repr(v) for v in verdicts.values()}) > 1:
        raise Found(f"two verdicts: {verdicts}")
    for r, (survivors, reports) in verdicts.items():
        if minority and not survivors >> r & 1:
            continue
        if set(reports) != set(agreement.members(survivors)) or any(
            v != ("report", s) for s, v in reports.items()
        ):
            raise Found(f"rank {r}: reports {reports} of survivors {survivors:b}")
        for other, lives in enumerate(alive):
            if lives and not ranks[other].stopped and other not in suspected and not survivors >> other & 1:
                raise Found(f"rank {other} lives and no rank has lost it, but {survivors:b} excludes it")
    stopped = [r for r, machine in enumerate(ranks) if alive[r] and machine.stopped]
    if stopped and (minority or not suspected):
        raise Found(f"ranks {stopped} stop without a reason")


def explore(schedules, machine=Agreement, minority=False, first=0):
    """Run `schedules` schedules; return (messages taken, the violation or None)."""
    taken = 0
    for seed in range(first, first + schedules):
        try:
            taken += run(seed, machine, minority)
        except Found as found:
            return taken, f"schedule {seed}: {found}"
    return taken, None


if __name__ == "__main__":
    taken, found = explore(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
    print(f"{taken} messages and news; {found or 'nothing found'}")
    sys.exit(found is not None)
