"""The longest sequence that fits."""

from peer.shapes import LENGTH


def search(fits, length, late):
    """The longest that fits, a multiple of 8192, and the shortest tried that does not (0: none was):
    doubling from `length`, then halving what is between. Ends early when `late()`."""
    low, high = 0, 0
    while not high and not late():
        if fits(length):
            low, length = length, 2 * length
        else:
            high = length
    while not low and high > LENGTH and not late():
        length = max(LENGTH, high // 2 // LENGTH * LENGTH)
        if fits(length):
            low = length
        else:
            high = length
    while high - low > LENGTH and low and not late():
        length = (low + high) // 2 // LENGTH * LENGTH
        if fits(length):
            low = length
        else:
            high = length
    return low, high
