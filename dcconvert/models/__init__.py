"""Where models come from: checkpoints and folders that diffusers saved; DiT, DC-DiT and the wrapper for pipelines."""
