"""The program that passes work on: options, graph, the ops it may hold, facts of a finished model, every error."""
