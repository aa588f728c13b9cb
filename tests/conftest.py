"""Tests use no hub, and one thread a worker."""

from __future__ import annotations

import os
import sys
import zlib
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402  (after the environment is set)

torch.set_num_threads(1)


# Tests over products of tables (methods and layers, methods and architectures) grow with both. `make test` runs a part of each
# that a rule chooses: every value of every table COVER times, cells in an order that depends on their names alone. The others are
# marked `product` and run by `make slow`, of which CI runs a part that changes from day to day.
PRODUCT, COVER = 40, 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="K/N", help="only the K-th of N parts of the tests; K of today is 'today'")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cells: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and len(item.callspec.params) > 1:
            cells[item.nodeid.partition("[")[0]].append(item)
    for product in cells.values():
        if len(product) > PRODUCT:
            for item in leave_out(product):
                item.add_marker("product")
    if (part := config.getoption("--part")) is not None:
        which, _, count = part.partition("/")
        n = int(count)
        k = date.today().toordinal() % n if which == "today" else int(which) - 1
        left = [i for i in items if zlib.crc32(i.nodeid.encode()) % n != k]
        config.hook.pytest_deselected(items=left)
        items[:] = [i for i in items if zlib.crc32(i.nodeid.encode()) % n == k]


def leave_out(product: list[pytest.Function]) -> list[pytest.Function]:
    """The cells of a product that the others cover."""
    seen: Counter[tuple[str, str]] = Counter()
    left = []
    for item in sorted(product, key=lambda i: zlib.crc32(i.nodeid.encode())):
        values = [(name, str(item.callspec.params[name])) for name in item.callspec.params]
        if all(seen[v] >= COVER for v in values):
            left.append(item)
        else:
            seen.update(values)
    return left
