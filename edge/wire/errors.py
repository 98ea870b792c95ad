"""What is raised for bytes that are not a message, and for messages of another version of the wire."""


class ProtocolError(ValueError):
    """The bytes are not a message of this kind, or a message holds a value that the wire cannot carry."""


class WireVersionError(ProtocolError):
    """A device speaks another version of the wire.

    Parameters
    ----------
    version
        The version that the device speaks.
    ours
        The version that this software speaks.

    Examples
    --------
    >>> str(WireVersionError(1, 2))
    "the device speaks wire version 1, this server speaks 2; update the device's firmware"
    """

    def __init__(self, version: int, ours: int) -> None:
        older = "the device's firmware" if version < ours else "the server"
        super().__init__(f"the device speaks wire version {version}, this server speaks {ours}; update {older}")
        self.version = version
