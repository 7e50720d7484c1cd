"""Detection -> Plan -> files, and the proof that they do the same."""
