"""The lowest layer: rewriting a torch.fx graph, from a captured DiT to one that computes fewer tokens.

Nothing here knows about ONNX, files or commands, and no pass knows the name of a class or a module.

- `methods`: one file per method: its options, its passes, and how many tokens its steps keep.
- `pipeline`, `numeric_gate`: running the passes of a method, and the check after every exact pass.
- `ir`: the `Program` that the passes work on, and the contract that every pass keeps.
- `frontend`: from a module to a program whose token stream is known.
- `rewrite`: the passes that change the graph.
- `packing`: rewriting the trunk for packed tokens.
- `planning`: what the host decides at each step, in numpy.
- `modules`: routers and other modules that are inserted.
- `runtime`: the converted model in torch.
- `serialise`: graphs as JSON.
"""
