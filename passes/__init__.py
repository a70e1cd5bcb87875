"""The ground floor: the rewriting of one torch.fx graph, from a captured DiT to a dynamic-chunking one.

Nothing here knows of ONNX, files or commands, and no pass knows the name of a class or a module.

In the order in which a model goes through them:

- `capture`: a module becomes a `Program`, one graph of ATen ops with a symbolic batch axis.
- `pipeline`: the passes as one tuple, and `rewrite`, which runs them.
- `normalise`, `token_stream`, `insert_router`, `pack_trunk`, `split_route`: one pass each.
- `packing`, `rules`: how the trunk is written again for packed tokens, one rule for each ATen op.
- `spec`, `model`: what a rewritten model is, and how it is called like the original.
- `retarget`: the same on another device or in another precision.

What they stand on:

- `infra`: the contract of a pass, the `Program`, the runner that checks every graph.
- `ops`: the custom ops of a rewritten graph, each with its reference.
- `routers`, `schedule`, `plan`, `neighbourhood`: where tokens are kept, when, and the index arrays that say so.
- `serialise`: graphs and their facts as data that loads without pickle.
- `errors`: every error that is the user's business.
"""
