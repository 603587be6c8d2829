"""What a model with a compressed cache needs in order to run: torch and transformers, and numba if it is there.

`save_pretrained` copies these files beside the weights, so that the checkpoint runs from its folder alone. They import
each other relatively and nothing else of the package.
"""
