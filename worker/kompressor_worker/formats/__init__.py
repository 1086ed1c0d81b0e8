"""File formats: names, shapes and layout of tensors as loaders read them."""
