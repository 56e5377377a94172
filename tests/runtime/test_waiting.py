"""Threads wait briefly, unless someone said how they should."""

from vitlr.runtime.waiting import SPINS, wait_briefly


def test_threads_fall_asleep_soon_where_nobody_said_otherwise():
    for said, spins in (
        ({}, str(SPINS)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ):
        environment = dict(said)
        wait_briefly(environment)
        assert environment.get("GOMP_SPINCOUNT") == spins
        assert said.items() <= environment.items()
