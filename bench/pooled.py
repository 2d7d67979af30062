"""How fast is a training step on four features with bags of 20 keys, whose rows are summed?"""

from collections.abc import Iterator

from bench import embedding
from bench.harness import Result, Settings
from bench.workload import Case


def run(settings: Settings) -> Iterator[Result]:
    return embedding.run("pooled", settings, Case(rows=1 << 23, dim=16, batch=1024, fields=4, bag=20), train=True)
