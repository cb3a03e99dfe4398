"""What the value of every legal move costs: positions a second on one core, one engine, `P:` rows of dev.

python -m benchmarks.engine_price
"""

import random
import time

from rookworld_trl.data import load_shipped
from rookworld_trl.engine_pool import EnginePool
from rookworld_trl.tasks import policy


def main() -> None:
    fens = [policy.parse_prompt(row["prompt"]) for row in load_shipped("dev") if row["task"] == "policy"]
    random.Random(1).shuffle(fens)
    for nodes, count in ((80_000, 150), (8_000, 400)):
        with EnginePool(1, nodes=nodes) as pool:
            list(pool.values(fens[-3:]))  # until it runs
            start = time.perf_counter()
            valued = sum(values is not None for values in pool.values(fens[:count]))
            seconds = time.perf_counter() - start
        print(f"{nodes} nodes: {valued} positions, {valued / seconds:.1f} a second, {seconds / valued:.3f} s each")


if __name__ == "__main__":
    main()
