"""Commands to devices: numbered, sealed and sent by the server's process alone."""
