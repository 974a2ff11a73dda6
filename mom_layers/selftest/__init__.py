"""The self-test: every kernel on the user's own card, forward and backward, beside the plain loops in float64.

    python -m mom_layers.selftest            all kernels at a few shapes, with times: at most two minutes on a GPU
    python -m mom_layers.selftest --help     what else there is

`cases` says what is compared and by which bounds. `operations`, `decoding` and `recurrences` have the cases; `checks`
lists them for the whole self-test and for the short one of a training run. `processes` runs checks in processes of
their own, so that a compiler or a kernel that ends its process costs one check alone. `speed` measures the card,
`report` prints.
"""
