"""Who belongs to the fleet: its certificate authority, the identities, and what each of them may do."""
