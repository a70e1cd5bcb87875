"""A converted model in torch: how it is called, how a run goes from step to step, and its sets of weights."""
