"""The wire between a server and its devices: topics, messages, chunks, update encodings, and what carries them.

protocol.cddl is the one source of the messages' form. Import from the module of the subject: `topics`, `messages`,
`chunks`, `updates`, `round_config`, `flower_records`, `mqtt_session`, `serial_frames`.
"""
