"""The graduated rewards that both tasks share: six steps from unparsable to right in every detail."""

LEVELS = (-0.3, 0.2, 0.4, 0.6, 0.8, 1.0)
UNPARSABLE = LEVELS[0]
VALID = LEVELS[1]  # the most that anything known as a cheat may earn
