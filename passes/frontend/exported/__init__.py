"""What torch.export leaves to do: other names of ops, regions in other modes, and a batch size that it fixed."""
