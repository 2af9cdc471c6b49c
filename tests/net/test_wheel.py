"""One timer for many limits."""

from __future__ import annotations

import asyncio
import math

from balancer.net.wheel import GRAIN_S, Wheel
from tests.e2e.stage import virtual


class Watched:
    """Moves when told to; remembers when it expired."""

    def __init__(self, wheel: Wheel, limit_s: float) -> None:
        self._wheel = wheel
        self._limit_s = limit_s
        self.moved_at = asyncio.get_running_loop().time()
        self.expired_at: float | None = None
        self.asked = 0
        wheel.add(self)
        wheel.by(self.moved_at + limit_s)

    def due(self) -> float:
        """When its limit passes."""
        self.asked += 1
        return self.moved_at + self._limit_s

    def expire(self) -> None:
        """It has passed."""
        self.expired_at = asyncio.get_running_loop().time()
        self._wheel.discard(self)


@virtual
async def test_each_expires_at_its_limit() -> None:
    """The earliest in time to the moment; others no later than a grain."""
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop)
    late, soon, never = Watched(wheel, 30.1), Watched(wheel, 30.0), Watched(wheel, math.inf)
    await asyncio.sleep(100)
    assert soon.expired_at == 30.0
    assert late.expired_at is not None
    assert 30.1 <= late.expired_at <= 30.0 + GRAIN_S
    assert never.expired_at is None
    assert list(wheel) == [never]


@virtual
async def test_what_moves_does_not_expire() -> None:
    """A limit that moves on needs no word; it is looked at once per limit, not once per move."""
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop)
    one = Watched(wheel, 20.0)
    for _ in range(1000):
        await asyncio.sleep(0.1)
        one.moved_at = loop.time()
    assert one.expired_at is None
    assert one.asked <= 6
    await asyncio.sleep(21)
    assert one.expired_at is not None
    assert one.expired_at - one.moved_at <= 20.0 + GRAIN_S


class Broken(Watched):
    """Has a bug."""

    def expire(self) -> None:
        """It has passed."""
        super().expire()
        raise RuntimeError("a bug")


@virtual
async def test_a_bug_in_one_is_nothing_to_the_others() -> None:
    """Whatever their order, they expire in the next round."""
    loop, told = asyncio.get_running_loop(), list[object]()
    loop.set_exception_handler(lambda _, context: told.append(context.get("exception")))
    wheel = Wheel(loop)
    broken = Broken(wheel, 10.0)
    others = [Watched(wheel, limit_s) for limit_s in (10.0, 10.0, 10.0, 20.0)]
    await asyncio.sleep(30)
    assert broken.expired_at == 10.0
    assert [str(error) for error in told] == ["a bug"]
    for one, limit_s in zip(others, (10.0, 10.0, 10.0, 20.0), strict=True):
        assert one.expired_at is not None
        assert limit_s <= one.expired_at <= limit_s + GRAIN_S


@virtual
async def test_many_limits_close_together_are_one_round() -> None:
    """A thousand limits a millisecond apart do not wake it a thousand times."""
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop)
    many = [Watched(wheel, 10.0 + n / 1000) for n in range(1000)]
    await asyncio.sleep(12)
    assert all(one.expired_at is not None for one in many)
    assert max(one.asked for one in many) <= 6


@virtual
async def test_an_expiry_may_end_others() -> None:
    """What is told of one limit may discard others, or add some."""
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop)
    one, other = Watched(wheel, 5.0), Watched(wheel, 7.0)
    added: list[Watched] = []

    def expire() -> None:
        wheel.discard(one)
        wheel.discard(other)
        added.append(Watched(wheel, 3.0))

    one.expire = expire  # type: ignore[method-assign]
    await asyncio.sleep(20)
    assert other.expired_at is None
    assert added[0].expired_at == 8.0


@virtual
async def test_nobody_watched_no_timer() -> None:
    """It keeps no loop awake, and closing it stops it."""
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop)
    one = Watched(wheel, 5.0)
    wheel.discard(one)
    await asyncio.sleep(6)
    assert not loop._scheduled  # type: ignore[attr-defined]
    other = Watched(wheel, 5.0)
    wheel.close()
    await asyncio.sleep(6)
    assert other.expired_at is None
