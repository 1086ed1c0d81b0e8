"""From `spec.target` to passes: what a result takes and gives on a GPU, which plans there are, and which one is chosen."""
