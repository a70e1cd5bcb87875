"""The program that passes work on: its graph, the ops it may contain, facts about a finished model, and all errors."""
