"""Blocks that take some images at a time through their attention: the same numbers."""

import pytest
import torch
from gradients import assert_same_with_gradients

from kernels import FocalGeometry, FocalLevel
from models import blocks, products
from models.blocks import COMPILED_PARTS, FocalBlock
from models.focal_attention import FocalAttention

DIM = 8


@pytest.fixture(autouse=True)
def _two_images_at_a_time(monkeypatch, fresh_compiler):
    monkeypatch.setattr(products, "PART_ROWS", 1)
    monkeypatch.setattr(blocks, "PART_SIZE", 2 * 3 * DIM * 6 * 7)


def small_block() -> FocalBlock:
    geometry = FocalGeometry(2, (FocalLevel(1, 4), FocalLevel(2, 3)))
    return FocalBlock(FocalAttention(DIM, 2, geometry, backend="eager"), DIM).double()


def maps(batch: int) -> torch.Tensor:
    return torch.randn(batch, 6, 7, DIM, dtype=torch.float64, requires_grad=True)


def assert_same_as_plain(got, block, x):
    assert_same_with_gradients(got, block(x), [x, *block.parameters()])


def attended(block: FocalBlock) -> list[int]:
    """How many images each call of the block's attention is given from now on."""
    counts: list[int] = []
    block.attn.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    return counts


@pytest.mark.parametrize(
    ("batch", "parts"),
    [(5, [2, 2, 1]), (2, [2]), (4 * COMPILED_PARTS, [4] * COMPILED_PARTS), (0, [0])],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_block_attends_some_images_at_a_time(batch, parts, training):
    block, seen, x = small_block().train(training), [], maps(batch)

    def keep(graph, _):
        calls = [node for node in graph.graph.nodes if "eager_attention" in str(node.target)]
        seen.extend(len(node.meta["example_value"]) for node in calls)
        return graph.forward

    got = torch.compile(block, fullgraph=True, backend=keep)(x)
    assert seen == parts
    assert_same_as_plain(got, block, x)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), got, atol=1e-10, rtol=0.0)


def test_a_block_compiled_for_any_batch_attends_all_images_together():
    block = small_block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 3):
        x = maps(batch)
        assert_same_as_plain(compiled(x), block, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        x = maps(9)
        assert_same_as_plain(compiled(x), block, x)


def test_an_exported_block_attends_all_images_together():
    block, x = small_block().eval(), maps(5)
    program = torch.export.export(block, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("focal.eager_attention.default") == 1
    torch.testing.assert_close(program.module()(x), block(x), atol=1e-10, rtol=0.0)


@pytest.mark.parametrize(("batch", "parts"), [(5, [2, 2, 1]), (2, [2]), (0, [0])])
def test_a_block_evaluates_some_images_at_a_time(batch, parts):
    block, x = small_block().eval(), maps(batch)
    expected, counts = block(x), attended(block)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, atol=1e-10, rtol=0.0)
    assert counts == parts


@pytest.mark.parametrize("training", [True, False])
def test_a_block_that_keeps_gradients_attends_all_images_together(training):
    block = small_block().train(training)
    counts = attended(block)
    block(maps(5))
    assert counts == [5]
