"""How fast are look-ups, from raw keys to vectors that a consumer reads?"""

from collections.abc import Iterator

from bench import embedding
from bench.harness import Result, Settings
from bench.workload import Case


def run(settings: Settings) -> Iterator[Result]:
    return embedding.run("lookup", settings, Case(rows=1 << 23, dim=16), train=False)
