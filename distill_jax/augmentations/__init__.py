"""One augmentation a file; the folder is the registry.

A module has a frozen dataclass `Augmentation`, called with (rng, example, other): a numpy
Generator, one example's arrays, and what draws another example of the source by the same
Generator. It returns a new example and is a function of these alone, so that a view is made again
bit for bit from (seed, row): teacher and student see the same one (arXiv:2106.05237).

Images are `pixels_WWM`, uint8 [height, width, channels], before they are normalised. Where two
images are mixed the label is drawn, a's with a's share: the cross-entropy is then that of the mixed
labels in expectation, and labels stay whole numbers.
"""
