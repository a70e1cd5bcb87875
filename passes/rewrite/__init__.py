"""The passes that change the graph: one rewrite per file."""
