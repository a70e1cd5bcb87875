"""The ATen ops that a graph may hold, in bundles of our own and in those of other people.

torch has more than 3,000 overloads, and not all of them check what they are given. A graph may hold those that packing
rules and ONNX lowerings know by name, elementwise ops, and what head and tail of a model are made of, which is listed
here. Every op that is listed computes tensors of plain shapes from its arguments, and checks its indices.
"""

from __future__ import annotations

from typing import Any

import torch

_LISTED = """
    _to_copy.default  to.dtype  to.dtype_layout  to.device  type_as.default  contiguous.default  clone.default
    detach.default  alias.default  lift_fresh_copy.default  copy.default

    arange.default  arange.start  arange.start_step  empty_like.default  eye.default  eye.m  full.default
    full_like.default  linspace.default  new_full.default  new_ones.default  new_zeros.default  ones.default
    ones_like.default  scalar_tensor.default  zeros.default  zeros_like.default

    sym_size.int  sym_numel.default

    broadcast_tensors.default  broadcast_to.default  cat.default  chunk.default  expand.default  expand_as.default
    flatten.using_ints  flip.default  meshgrid.default  meshgrid.indexing  movedim.int  movedim.intlist  narrow.default
    permute.default  pixel_shuffle.default  pixel_unshuffle.default  repeat.default  repeat_interleave.self_int
    reshape.default  roll.default  rot90.default  select.int  slice.Tensor  split.Tensor  split.sizes
    split_with_sizes.default  squeeze.default  squeeze.dim  squeeze.dims  stack.default  swapaxes.default  t.default
    tile.default  transpose.int  tril.default  triu.default  unbind.int  unflatten.int  unfold.default
    unsqueeze.default  view.default  view_as.default  _unsafe_view.default  view_as_complex.default
    view_as_real.default  view.dtype  real.default  imag.default  polar.default  complex.default
    constant_pad_nd.default  pad.default
    reflection_pad1d.default  reflection_pad2d.default  replication_pad1d.default  replication_pad2d.default

    embedding.default  gather.default  index.Tensor  index_put.default  index_select.default  masked_fill.Scalar
    masked_fill.Tensor  one_hot.default  scatter.src  scatter.value  scatter_add.default  select_scatter.default
    slice_scatter.default  take_along_dim.default  where.ScalarOther  where.ScalarSelf  where.Scalar

    all.default  all.dim  amax.default  amin.default  any.default  any.dim  argmax.default  argmin.default
    argsort.default  cumprod.default  cumsum.default  linalg_vector_norm.default  logsumexp.default  max.default
    max.dim  mean.default  mean.dim  min.default  min.dim  norm.ScalarOpt_dim  prod.default  prod.dim_int
    sort.default  std.correction  std.dim  sum.default  sum.dim_IntList  topk.default  var.correction  var.dim
    var_mean.correction

    addmm.default  baddbmm.default  bmm.default  bilinear.default  dot.default  einsum.default  inner.default
    linear.default  matmul.default  mm.default  mv.default  outer.default  tensordot.default
    scaled_dot_product_attention.default

    adaptive_avg_pool1d.default  adaptive_avg_pool2d.default  avg_pool1d.default  avg_pool2d.default  conv1d.default
    conv2d.default  conv2d.padding  conv3d.default  conv_transpose2d.input  convolution.default  max_pool2d.default
    upsample_bicubic2d.default  upsample_bicubic2d.vec  upsample_bilinear2d.default  upsample_bilinear2d.vec
    upsample_nearest1d.default  upsample_nearest2d.default  upsample_nearest2d.vec

    batch_norm.default  dropout.default  feature_dropout.default  group_norm.default  instance_norm.default
    layer_norm.default  native_group_norm.default  native_layer_norm.default  rms_norm.default
    glu.default  hardswish.default  log_softmax.int  prelu.default  softmax.int
"""


def _found(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload, None)  # None: not in this version of torch


LISTED = frozenset(op for name in _LISTED.split() if (op := _found(name)) is not None)
_NOT_ELEMENTWISE_ENOUGH = ("special_", "_")  # polynomials of any degree take any time; names of torch's own


def is_known(target: Any) -> bool:
    """Whether a target is listed, or an elementwise op; also one that writes its result over its argument."""
    if target in LISTED:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    name = target._schema.name.removeprefix("aten::")
    elementwise = torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags
    writes_elsewhere = target._schema.is_mutable and not name.endswith("_")
    return elementwise and not (
        writes_elsewhere or name.startswith(_NOT_ELEMENTWISE_ENOUGH) or name.endswith("_backward")
    )
