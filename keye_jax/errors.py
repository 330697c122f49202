"""Errors of the model library; each message is one line that names the cause and the mend."""


class ConfigError(ValueError):
    """config.json holds something this library does not know, cannot run, or cannot do without."""


class CheckpointError(ValueError):
    """The weights do not fit the configuration, or their files are damaged."""
