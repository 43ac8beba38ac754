"""What an import brings in, what it can do without, and which way imports go."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fusedrnn"


def run(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDRNN_")}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- in a fresh process ------------------------------------------------------------------------


def test_torch_alone_is_enough() -> None:
    run(
        """
import sys, warnings
for name in ("triton", "fusedrnn._C", "rich", "matplotlib", "hypothesis", "pytest"):
    sys.modules[name] = None  # importing it raises ImportError
import torch, fusedrnn
torch.manual_seed(0)
stock = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
fused = fusedrnn.LSTM(3, 4, num_layers=2, bidirectional=True)
fused.load_state_dict(stock.state_dict())
x = torch.randn(5, 2, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y, _ = fused(x)
    y.sum().backward()
assert "torch's own path" in str(caught[0].message), caught
assert torch.equal(y, stock(x)[0])
with fusedrnn.use_backend("reference"):
    y, _ = fused(x)
    fused.zero_grad()
    y.sum().backward()
stock(x)[0].sum().backward()
assert torch.allclose(y, stock(x)[0], atol=1e-6)
for a, b in zip(fused.parameters(), stock.parameters()):
    assert torch.allclose(a.grad, b.grad, atol=1e-5)
from fusedrnn.__main__ import main
from fusedrnn.testing import assert_parity
assert_parity(fusedrnn.GRU(3, 4))
assert main(["doctor"]) == 1
"""
    )


def test_an_import_brings_nothing_that_torch_did_not() -> None:
    found = run(
        """
import sys, torch
before = set(sys.modules)
import fusedrnn
print(*sorted(set(sys.modules) - before))
"""
    ).split()
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "torch.onnx",
        "triton",
        "numpy",
        "hypothesis",
        "rich",
        "matplotlib",
        "pytest",
    )
    assert [name for name in found if name.startswith(heavy)] == []
    ours = {name.split(".")[1] for name in found if name.startswith("fusedrnn.")}
    assert ours.isdisjoint(
        {"testing", "pytest_plugin", "doctor", "parity", "bench", "demo", "terminal", "tools"}
    )


# ---- one way -----------------------------------------------------------------------------------

FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = {*FILES, "fusedrnn._C"}
# Each may import from what follows it, and from its own room.
ROOMS = (
    *("bench", "parity", "doctor", "tools", "pytest_plugin", "testing", "budget", "terminal", "plot"),
    *("replace", "enable", "explain", "streaming", "stored"),
    *("modules", "functional", "straight", "stack", "attend", "linear", "ops", "autograd", "operators"),
    *("backends", "saving", "dtypes", "scores", "cells", "_C"),
)


def imports(name: str) -> Iterator[str]:
    """The files of the package that a file imports, anywhere in it."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            # `from x import y` imports the file x.y where there is one, else x
            found = [name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
        else:
            continue
        yield from (module for module in found if module in MODULES)


GRAPH = {name: set(imports(name)) - {name} for name in FILES}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_the_graph_is_read_from_the_files() -> None:
    assert "fusedrnn.ops" in GRAPH["fusedrnn.functional"]
    assert "fusedrnn.cells" in GRAPH["fusedrnn.backends.reference.layer"]
    assert "fusedrnn.functional" in GRAPH["fusedrnn.modules.forward"]
    assert {room(name) for name in MODULES} >= set(ROOMS)


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in ROOMS])
def test_imports_go_down_the_house(name: str) -> None:
    below = ROOMS[ROOMS.index(room(name)) :]
    assert {found for found in GRAPH[name] if room(found) not in below} == set()


def test_backends_never_import_each_other() -> None:
    choosing = {"fusedrnn.backends.select", "fusedrnn.backends.hand_over"}
    rooms = {name: name.split(".")[2] for name in FILES if name.startswith("fusedrnn.backends.")}
    on_gpus = {"native", "triton"}  # share what is around a scan
    for name, backend in rooms.items():
        seen = {rooms[found] for found in GRAPH[name] if found in rooms}
        allowed = {backend, "gpu"} if backend in on_gpus else {backend}
        assert seen <= ({"select"} if name in choosing else allowed), name


def test_only_the_native_backend_knows_the_kernels() -> None:
    assert [name for name in FILES if "fusedrnn._C" in GRAPH[name]] == ["fusedrnn.backends.native"]


def test_there_is_no_circle() -> None:
    # demo uses the public names, as a user's program does
    left = {name: found - {"fusedrnn"} for name, found in GRAPH.items() if name != "fusedrnn"}
    while left:
        free = [name for name, found in left.items() if not found & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for name in free:
            del left[name]
