"""The operator: watches CompressionJobs, starts workers, tells the truth on the status."""
