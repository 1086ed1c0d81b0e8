"""The worker: streams a checkpoint through passes, one block in memory."""
