"""The traced graph, simplified: constants folded, and what opset 23 has one operator for in one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.onnx.grouped_attention import share_keys_and_values

if TYPE_CHECKING:
    import onnx_ir


def optimize(model: onnx_ir.Model) -> None:
    """Fold constants (weight transposes among them), drop what does nothing, and fuse to opset 23's large operators.

    These are the passes of torch's own `ONNXProgram.optimize` with the rewrite rules that occur in transformers. One
    of the rules left out, which looks for pairs of slices, takes time with the square of the graph's size: 10 of 48
    CPU seconds for 30 layers.
    """
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import RewritePass, onnx_fusions
    from onnxscript.rewriter.rules import common as rules

    rewrite = RewritePass(
        [
            rules.add_0_rule,
            rules.sub_0_rule,
            rules.mul_by_1_rule,
            rules.div_by_1_rule,
            rules.cast_cast_rule,
            rules.no_op_cast_rule,
            rules.no_op_expand_rule,
            rules.no_op_transpose_rule,
            rules.transpose_transpose_rule,
            rules.unsqueeze_unsqueeze_rule,
            rules.squeeze_reshape_1d_rule,
            rules.reshape_reshape_rule,
            rules.collapse_slice_rule,
            rules.collapse_slice2_rule,
            rules.one_reshape_matmul_reshape_rule,
            rules.two_reshapes_matmul_reshape_rule,
            rules.materialize_reshape_shape_rule,
        ]
    )
    passes.InlinePass()(model)
    for _ in range(2):  # the first round uncovers what the second simplifies
        # A result larger than this is kept only where it replaces its operand: a tied embedding, which is looked up
        # and multiplied with, is then stored once and transposed by a node.
        fold_constants(model, output_size_limit=1024)
        rewrite(model)
        passes.RemoveUnusedNodesPass()(model)
    for tidy in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
    ):
        tidy(model)
    onnx_fusions.fuse(model)
    share_keys_and_values(model)
    for last in (
        passes.CommonSubexpressionEliminationPass(),  # a fused rotation has its own cosine and sine
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        last(model)
