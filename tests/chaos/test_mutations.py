"""The list of mutations holds for the sources as they are; `make mutate` runs them."""

from __future__ import annotations

import ast

import pytest
from mutations import MUTATIONS, ROOT, TESTS, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.guard)
def test_it_applies_to_one_place_and_its_test_is_there(mutation: Mutation) -> None:
    ast.parse(mutated(mutation))
    file, name = mutation.test.split("::")
    found = ast.walk(ast.parse((ROOT / TESTS / file).read_text()))
    assert name in {node.name for node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
