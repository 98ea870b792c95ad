"""From a model to a board: compile, build, measure, emulate, and join the fleet over a serial line."""
