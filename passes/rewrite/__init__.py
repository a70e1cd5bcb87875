"""The passes that change the graph: one rewrite a file."""
