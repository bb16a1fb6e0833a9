"""Constants of the distributed tests."""

TIMEOUT = 60  # seconds in which a process must end
