"""Names of the baselines, and the numbers that a command line may give."""

STATE_PER_MEMORY = "state per memory"
STATE_BY_HEADS = "state in all, by heads"
STATE_BY_KEYS = "state in all, by K"
STATE_BY_VALUES = "state in all, by V"
PARAMETERS = "parameters"
TIME = "time a step"
ATTENTION = "softmax attention"
# what a command line calls them, in the order of the table
MATCHES = {
    "memory": STATE_PER_MEMORY,
    "heads": STATE_BY_HEADS,
    "keys": STATE_BY_KEYS,
    "values": STATE_BY_VALUES,
    "parameters": PARAMETERS,
    "time": TIME,
    "softmax": ATTENTION,
}
MOST_SEEDS = 1 << 31  # half of what the CPU's generator tells apart: it reads 32 bits of a seed
