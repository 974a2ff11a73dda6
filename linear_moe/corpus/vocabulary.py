"""Sizes of the vocabularies that can be trained."""

SMALLEST_VOCABULARY = 257  # every byte and the end-of-document token
LARGEST_VOCABULARY = 1 << 20  # the trainer reserves memory for all of it
