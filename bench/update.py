"""How fast is a training step: look-up, a consumer that reads the vectors, and an exact update?"""

from collections.abc import Iterator

from bench import embedding
from bench.harness import Result, Settings
from bench.workload import Case


def run(settings: Settings) -> Iterator[Result]:
    return embedding.run("update", settings, Case(rows=1 << 23, dim=16), train=True)
