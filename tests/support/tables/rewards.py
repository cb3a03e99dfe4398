"""The table of docs/rewards.md: what players and cheats earn, and earned."""

from tests.support.tables.cells import number, read, table


def players() -> str:
    report = read("players")
    rows = [
        (name, number(report["before"][name]["reward"]), number(earned["reward"]))
        for name, earned in report["now"].items()
    ]
    return table(("who writes", "before", "now"), "lrr", rows)


TABLES = {"players": players}
