"""From a module to a program: capturing the graph, normalising its ops, and finding its token stream."""
