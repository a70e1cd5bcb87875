"""From a module to a program: capture, one spelling for every op, and where the token stream runs through the graph."""
